#!/usr/bin/env bash
# The whole story, stage after stage; what is done already is passed over, so that the same command goes on after a stop.
#
#   launch/pipeline.sh demo     on this machine: drawings, the warm-up, Emu, the decoder, the page that shows them, and answers (40 minutes on two cores)
#   launch/pipeline.sh paper    the paper's: the data, the weights, pretraining, the decoder, a picture, instruction tuning, a benchmark
#
# Needs .venv (make .venv/ready). For "paper" also RAW, a folder of downloads: laion-2b, laion-coco, laion-aesthetics and webvid (img2dataset's and
# video2dataset's tars), mmc4 (JSONL and images), yt-storyboard (tars), sharegpt, alpaca, llava, videochat and videochatgpt (conversations, with their
# pictures and videos), eva-clip, llama (with its tokenizer.model) and stable-diffusion (weights), and vqav2 (that benchmark's own files).
# May be set: TRAIN, what starts a run on your devices, like "launch/local.sh 8 .venv/bin/python -m emu_jax.train" (a process a GPU), or
# "sbatch --wait launch/slurm.sbatch"; SIZE, of configs/sizes.py (emu-14b).
set -euo pipefail

python=.venv/bin/python
read -ra train <<<"${TRAIN:-$python -m emu_jax.train}"

data() {                                # data KIND NAME FOLDER FLAG...: a data set, unless it is there
  if [[ ! -e data/$2/done ]]; then
    "$python" -m emu_jax.data build --kind="$1" --from="$3" --to="data/$2" "${@:4}"
    touch "data/$2/done"
  fi
}

weights() {                             # weights NAME ARGUMENT...: foreign weights as a checkpoint, unless it is there
  if [[ ! -d runs/$1/checkpoints ]]; then
    "$python" -m emu_jax.weights import "${@:2}" --to="runs/$1"
  fi
}

case ${1:-} in
  demo)
    if [[ ! -f data/demo/tokenizer.json ]]; then
      "$python" -m emu_jax.demo build --to=data/demo
    fi
    "${train[@]}" --config=configs/demo.py:warmup
    "${train[@]}" --config=configs/demo.py:emu
    "$python" -m emu_jax.generate precompute --config=configs/demo.py:decoder --to=runs/demo/conditions
    "${train[@]}" --config=configs/demo.py:decoder
    "$python" -m emu_jax.demo evaluate --checkpoint=runs/demo/emu --decoder=runs/demo/decoder
    "${train[@]}" --config=configs/demo.py:instruct
    "$python" -m emu_jax.demo chat --checkpoint=runs/demo/instruct
    ;;
  paper)
    if [[ ! -d ${RAW:-} ]]; then
      echo "error: set RAW to the folder of the downloads; what it holds stands at the top of launch/pipeline.sh" >&2
      exit 2
    fi
    raw=$RAW
    size=${SIZE:-emu-14b}
    tokenizer=--config.data.tokenizer=$raw/llama/tokenizer.model
    for name in laion-2b laion-coco; do
      data pairs "$name" "$raw/$name"
    done
    for name in laion-coco laion-aesthetics; do         # for the decoder
      data pairs "$name-150" "$raw/$name" --max-chars=150
    done
    data mmc4 mmc4 "$raw/mmc4"
    data videos webvid "$raw/webvid"
    data storyboards yt-storyboard "$raw/yt-storyboard"
    for name in sharegpt alpaca llava videochat videochatgpt; do
      data "$name" "$name" "$raw/$name"
    done

    weights start --family=eva-clip "$raw/eva-clip" --family=llama "$raw/llama" --config="configs/pretrain.py:$size"
    weights stable-diffusion --family=stable-diffusion "$raw/stable-diffusion" --config="configs/decoder.py:$size"

    "${train[@]}" --config="configs/pretrain.py:$size" --config.workdir=runs/emu --config.init=runs/start "$tokenizer"
    # 32 tokens of the LLM for every caption, on the devices of this machine. For several: this command on each of them, with --hosts=N --host=K
    "$python" -m emu_jax.generate precompute --config="configs/decoder.py:$size" --config.init=runs/emu "$tokenizer" --to=data/conditions
    "${train[@]}" --config="configs/decoder.py:$size" --config.workdir=runs/decoder --config.init=runs/emu,runs/stable-diffusion "$tokenizer"
    "$python" -m emu_jax.generate --checkpoint=runs/emu --decoder=runs/decoder --image --out=dog.png "a photo of a dog"
    "${train[@]}" --config="configs/instruct.py:$size" --config.workdir=runs/instruct --config.init=runs/emu "$tokenizer"
    "$python" -m emu_jax.evaluate --task=vqav2 --data="$raw/vqav2" --checkpoint=runs/instruct
    ;;
  *)
    echo "error: usage: launch/pipeline.sh demo, or: RAW=FOLDER launch/pipeline.sh paper" >&2
    exit 2
    ;;
esac

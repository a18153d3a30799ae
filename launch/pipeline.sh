#!/usr/bin/env bash
# Run all stages in order. Finished ones are skipped, so the same command resumes after a stop.
#
#   launch/pipeline.sh demo     make demo and make demo-chat: a small Emu on this machine
#   launch/pipeline.sh paper    the paper's model: data, weights, pretraining, decoder, a sample
#                               image, instruction tuning, a benchmark
#
# Needs .venv (make .venv/ready). "paper" also needs RAW, a folder with these downloads:
#   laion-2b, laion-coco, laion-aesthetics, webvid      tars of img2dataset and video2dataset
#   mmc4, yt-storyboard                                 JSONL and images; tars
#   sharegpt, alpaca, llava, videochat, videochatgpt    conversations, with images and videos
#   eva-clip, llama, stable-diffusion                   weights; llama/ also has tokenizer.model
#   vqav2                                               the files of the benchmark
# Optional: TRAIN, the command that starts a run on your devices, such as
# "launch/local.sh 8 .venv/bin/python -m emu_jax.train" (one process per GPU) or
# "sbatch --wait launch/slurm.sbatch"; SIZE, a name in configs/sizes.py (default: emu-14b).
set -euo pipefail

python=.venv/bin/python
read -ra train <<<"${TRAIN:-$python -m emu_jax.train}"

# data KIND NAME FOLDER FLAG...: build a data set unless it exists.
data() {
  if [[ ! -e data/$2/done ]]; then
    "$python" -m emu_jax.data build --kind="$1" --from="$3" --to="data/$2" "${@:4}"
    touch "data/$2/done"
  fi
}

# weights NAME ARGUMENT...: import weights as a checkpoint unless it exists.
weights() {
  if [[ ! -d runs/$1/checkpoints ]]; then
    "$python" -m emu_jax.weights import "${@:2}" --to="runs/$1"
  fi
}

case ${1:-} in
  demo)
    make demo demo-chat
    ;;
  paper)
    if [[ ! -d ${RAW:-} ]]; then
      echo "error: set RAW to the folder of the downloads that launch/pipeline.sh lists" >&2
      exit 2
    fi
    raw=$RAW
    size=${SIZE:-emu-14b}
    tokenizer=--config.data.tokenizer=$raw/llama/tokenizer.model
    for name in laion-2b laion-coco; do
      data pairs "$name" "$raw/$name"
    done
    # The decoder trains on short captions only.
    for name in laion-coco laion-aesthetics; do
      data pairs "$name-150" "$raw/$name" --max-chars=150
    done
    data mmc4 mmc4 "$raw/mmc4"
    data videos webvid "$raw/webvid"
    data storyboards yt-storyboard "$raw/yt-storyboard"
    for name in sharegpt alpaca llava videochat videochatgpt; do
      data "$name" "$name" "$raw/$name"
    done

    pretrain=configs/pretrain.py:$size
    decoder=configs/decoder.py:$size
    instruct=configs/instruct.py:$size
    weights start --family=eva-clip "$raw/eva-clip" --family=llama "$raw/llama" --config="$pretrain"
    weights stable-diffusion --family=stable-diffusion "$raw/stable-diffusion" --config="$decoder"

    "${train[@]}" --config="$pretrain" --config.workdir=runs/emu --config.init=runs/start \
      "$tokenizer"
    # Compute the 32 visual tokens of every caption, on the devices of this machine. To share the
    # work, run this command on N machines, each with --hosts=N and its own --host=K.
    "$python" -m emu_jax.generate precompute --config="$decoder" --config.init=runs/emu \
      "$tokenizer" --to=data/conditions
    "${train[@]}" --config="$decoder" --config.workdir=runs/decoder \
      --config.init=runs/emu,runs/stable-diffusion "$tokenizer"
    "$python" -m emu_jax.generate --checkpoint=runs/emu --decoder=runs/decoder \
      --image --out=dog.png "a photo of a dog"
    "${train[@]}" --config="$instruct" --config.workdir=runs/instruct --config.init=runs/emu \
      "$tokenizer"
    "$python" -m emu_jax.evaluate --task=vqav2 --data="$raw/vqav2" --checkpoint=runs/instruct
    ;;
  *)
    echo "error: usage: launch/pipeline.sh demo, or: RAW=FOLDER launch/pipeline.sh paper" >&2
    exit 2
    ;;
esac

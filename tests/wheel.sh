#!/bin/sh
# What a user sees who installed only the wheel, in an empty folder: sh tests/wheel.sh BIN, where
# BIN is the bin folder of the environment. `make test-wheel` makes one.
set -eu
bin=$1
cd "$(mktemp -d)"

# expect STATUS PATTERN COMMAND...: the exit status, and a line of output
expect() {
  status=$1 pattern=$2
  shift 2
  code=0
  "$@" >out 2>&1 || code=$?
  if [ "$code" != "$status" ] || ! grep -q "$pattern" out; then
    echo "FAILED: $* ended with $code:" >&2
    tail -n 20 out >&2
    exit 1
  fi
  echo "ok: $(basename "$1") ${2-}"
}

expect 2 "^error: missing: a workdir" "$bin/emu-train" --config=configs/pretrain.py
expect 2 "^error: no config file 'configs/none.py'; there are .*pretrain" \
  "$bin/emu-train" --config=configs/none.py
expect 0 "data.tokenizer" "$bin/emu-train" --help
for command in data generate evaluate weights fit verify demo; do
  expect 0 "usage" "$bin/emu-$command" --help
done
expect 0 "^Session" "$bin/python" -c "from emu_jax import Session; print(Session.__name__)"
expect 0 "^[0-9]" "$bin/python" -c "import emu_jax; print(emu_jax.__version__)"
# A tiny LLaMA, written by hand: the dry run lists what would be imported.
mkdir llama
"$bin/python" - <<'PYTHON'
import json
import math

width, ffn, vocab = 8, 16, 32
layer = "model.layers.0"
shapes = {
    "model.embed_tokens.weight": [vocab, width],
    "model.norm.weight": [width],
    "lm_head.weight": [vocab, width],
    f"{layer}.input_layernorm.weight": [width],
    f"{layer}.post_attention_layernorm.weight": [width],
    f"{layer}.mlp.gate_proj.weight": [ffn, width],
    f"{layer}.mlp.up_proj.weight": [ffn, width],
    f"{layer}.mlp.down_proj.weight": [width, ffn],
}
shapes |= {f"{layer}.self_attn.{name}_proj.weight": [width, width] for name in "qkvo"}
header, end = {}, 0
for name, shape in shapes.items():
    start, end = end, end + 4 * math.prod(shape)
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
text = json.dumps(header).encode()
with open("llama/model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text + bytes(end))
with open("llama/config.json", "w") as file:
    json.dump({"model_type": "llama", "num_attention_heads": 2, "rms_norm_eps": 1e-6}, file)
PYTHON
expect 0 "llama" "$bin/emu-weights" import --family=llama llama --dry-run
mkdir pages
echo "<p>a page" >pages/a.html
expect 2 "^error: .*pip install '\.\[data\]'" \
  "$bin/emu-data" inspect pages --kind=html
echo "1 passed, 0 failed"

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
# A LLaMA of one tensor: everything else is missing, and the dry run says so in one line.
mkdir llama
"$bin/python" -c "
import json
import numpy as np
header = {'lm_head.weight': {'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [0, 16]}}
text = json.dumps(header).encode()
data = len(text).to_bytes(8, 'little') + text + np.zeros(4, np.float32).tobytes()
open('llama/model.safetensors', 'wb').write(data)"
expect 2 "^error: .*missing" "$bin/emu-weights" import --family=llama llama --dry-run
expect 2 "^error: .*emu-jax\[data\]" \
  "$bin/emu-data" inspect out --kind=html
echo "1 passed, 0 failed"

#!/usr/bin/env bash
# N processes of one run on this machine, as on N hosts: launch/local.sh N python -m emu_jax.train --config=...
# Needs bash, sed and python3. Process K has GPU K, where there are GPUs; on a CPU it has the devices that XLA_FLAGS or JAX_NUM_CPU_DEVICES say.
# Its lines begin with "[K] ". Ctrl-C and SIGTERM reach all. Where one fails, the others have GRACE seconds (5) to end before they are killed; the
# exit status is the first failure's.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: launch/local.sh N COMMAND...: N processes of a command, like 2 python -m emu_jax.train --config=configs/demo.py" >&2
  exit 2
fi
count=$1
shift

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

JAX_COORDINATOR_ADDRESS="127.0.0.1:$(free_port)"
JAX_NUM_PROCESSES=$count
export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES

named() {                               # outlives what it reads from: a signal to the whole group ends that first
  trap '' TERM INT
  exec sed -u "s/^/[$1] /"
}

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

for ((number = 0; number < count; number++)); do
  JAX_PROCESS_ID=$number JAX_LOCAL_DEVICE_IDS=$number "$@" > >(named "$number") 2> >(named "$number" >&2) &
  pids+=("$!")
done

status=0
deadline=
running=("${pids[@]}")
while ((${#running[@]})); do
  sleep 0.2                             # no `wait -n`: a signal would end it
  still=()
  for pid in "${running[@]}"; do
    code=0
    if kill -0 "$pid" 2>/dev/null; then
      still+=("$pid")
    else
      wait "$pid" || code=$?
    fi
    if ((code && !status)); then
      status=$code
      deadline=$((SECONDS + ${GRACE:-5}))
    fi
  done
  running=("${still[@]}")
  if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#running[@]})); then
    kill -KILL "${running[@]}" 2>/dev/null || true      # they wait for the one that is gone
  fi
done
exit "$status"

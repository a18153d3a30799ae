#!/usr/bin/env bash
# Several processes of one run on this machine, as if on several hosts:
#
#   launch/local.sh N python -m emu_jax.train --config=...
#
# Needs bash, sed and python3. Process K uses GPU K if there are GPUs, and otherwise the number of
# CPU devices that XLA_FLAGS or JAX_NUM_CPU_DEVICES sets. Its output lines start with "[K] ". Ctrl-C
# and SIGTERM reach all processes. When one fails, the others have GRACE seconds (default: 5) to exit
# before they are killed; the exit status is that of the first failure.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: launch/local.sh N COMMAND..., like 2 python -m emu_jax.train --config=..." >&2
  exit 2
fi
count=$1
shift

free_port() {
  python3 -c '
import socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(free.getsockname()[1])
'
}

JAX_COORDINATOR_ADDRESS="127.0.0.1:$(free_port)"
JAX_NUM_PROCESSES=$count
export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES

# prefix K: prefix each line with "[K] ". Signals may reach the whole process group; sed ignores
# them, because it must outlive the process whose output it reads.
prefix() {
  trap '' TERM INT
  exec sed -u "s/^/[$1] /"
}

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

for ((number = 0; number < count; number++)); do
  JAX_PROCESS_ID=$number JAX_LOCAL_DEVICE_IDS=$number "$@" \
    > >(prefix "$number") 2> >(prefix "$number" >&2) &
  pids+=("$!")
done

status=0
deadline=
running=("${pids[@]}")
while ((${#running[@]})); do
  # Poll, because a signal would interrupt `wait -n`.
  sleep 0.2
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
    # They are probably blocked in a collective with the process that failed.
    kill -KILL "${running[@]}" 2>/dev/null || true
  fi
done
exit "$status"

#!/usr/bin/env bash
# One run on a TPU pod slice, or several: asks Google Cloud for it as a queued resource, waits, installs, trains on every host, and asks again when it
# is preempted: launch/tpu_pod.sh NAME --config=configs/pretrain.py --config.checkpoint.to=gs://BUCKET/RUN ...
#
# Needs the gcloud command, logged in, with these set: PROJECT, ZONE (like us-east5-a), TYPE (like v5p-128), and RUNTIME (the TPU software, like
# v2-alpha-tpuv5). May be set: NODES (slices, 1), SPOT=1 (cheaper, preempted), REPO (a git URL that the hosts can clone; else this checkout's origin)
# and REF (its commit; else HEAD, which must be pushed). The data must be in the config at paths that every host sees (a mounted bucket or a Filestore).
# Metrics are in ~/run of the first host, for as long as the slice lives. It is given back at the end, and on Ctrl-C.
set -euo pipefail

name=${1:-}
for needed in PROJECT ZONE TYPE RUNTIME; do
  if [[ -z ${!needed:-} ]]; then
    echo "error: set $needed; what it is stands at the top of launch/tpu_pod.sh" >&2
    exit 2
  fi
done
if [[ ! $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ || $# -lt 2 ]]; then
  echo "error: usage: launch/tpu_pod.sh NAME --config=FILE --config.checkpoint.to=gs://BUCKET/RUN [...]; NAME is of a-z, 0-9 and -" >&2
  exit 2
fi
if ! command -v gcloud >/dev/null; then
  echo "error: there is no gcloud command: https://cloud.google.com/sdk/docs/install" >&2
  exit 2
fi
shift
repo=${REPO:-$(git remote get-url origin)}
ref=${REF:-$(git rev-parse HEAD)}
nodes=${NODES:-1}
where=(--project="$PROJECT" --zone="$ZONE")

ask() {
  local how=(--node-id="$name")
  if ((nodes > 1)); then
    how=(--node-count="$nodes" --node-prefix="$name")
  fi
  if [[ -n ${SPOT:-} ]]; then
    how+=(--spot)
  fi
  gcloud compute tpus queued-resources create "$name" "${where[@]}" "${how[@]}" --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo NONE
}

give_back() {
  gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet || true
}

everywhere() {                          # a command on every host of every slice at once: they are one run
  local hosts=() slice
  if ((nodes == 1)); then
    hosts=("$name")
  else
    for ((slice = 0; slice < nodes; slice++)); do
      hosts+=("$name-$slice")
    done
  fi
  local pids=() status=0 pid
  for slice in "${hosts[@]}"; do
    gcloud compute tpus tpu-vm ssh "$slice" "${where[@]}" --worker=all --command="$1" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  return "$status"
}

install="set -e; rm -rf emu && git clone -q '$repo' emu && cd emu && git checkout -q '$ref'
  python3 -m venv .venv && .venv/bin/python -m pip install -q -r requirements-tpu.txt -r requirements-gcs.txt"
train="cd emu && exec .venv/bin/python -m emu_jax.train --config.workdir=../run $(printf '%q ' "$@")"

trap give_back EXIT
trap 'exit 130' INT TERM
failures=0
while true; do
  case $(state) in
    ACTIVE)
      everywhere "$install"
      status=0
      began=$SECONDS
      everywhere "$train" || status=$?
      sleep 60                          # a preemption shows late, and lets the run save and end with 0
      if ((status == 0)) && [[ $(state) == ACTIVE ]]; then
        exit 0
      fi
      failures=$((status && SECONDS - began < 900 ? failures + 1 : 0))
      if ((failures == 3)); then
        echo "error: the run failed three times within its first minutes; what it said stands above" >&2
        exit 1
      fi
      echo "the run ended with status $status; it goes on from its last checkpoint" >&2
      ;;
    NONE) ask ;;
    FAILED | SUSPENDED) give_back ;;
    *) sleep 30 ;;
  esac
done

#!/usr/bin/env bash
# One run on a TPU pod slice, or on several:
#
#   launch/tpu_pod.sh NAME --config=configs/pretrain.py --config.checkpoint.to=gs://BUCKET/RUN ...
#
# It requests the slice from Google Cloud as a queued resource, waits for it, installs this code,
# trains on every host, and requests a new slice after a preemption. It releases the slice at the end
# and on Ctrl-C.
#
# Needs the gcloud command, logged in, and these variables:
#   PROJECT, ZONE      project and zone of Google Cloud, such as us-east5-a
#   TYPE, RUNTIME      type of the slice, such as v5p-128; TPU software, such as v2-alpha-tpuv5
# Optional:
#   NODES              number of slices (default: 1)
#   SPOT               1: use spot capacity, which is cheaper and may be preempted
#   REPO, REF          git URL that the hosts can clone, and commit (default: origin and HEAD, which
#                      must be pushed)
# All hosts must see the data at the paths in the config: use a mounted bucket or Filestore. Metrics
# are in ~/run on the first host as long as the slice exists.
set -euo pipefail

name=${1:-}
for needed in PROJECT ZONE TYPE RUNTIME; do
  if [[ -z ${!needed:-} ]]; then
    echo "error: set $needed; the top of launch/tpu_pod.sh explains it" >&2
    exit 2
  fi
done
if [[ ! $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ || $# -lt 2 ]]; then
  echo "error: usage: launch/tpu_pod.sh NAME --config=FILE --config.checkpoint.to=gs://BUCKET/RUN" \
    "[...]; NAME has only a-z, 0-9 and -" >&2
  exit 2
fi
if ! command -v gcloud >/dev/null; then
  echo "error: gcloud is not installed: https://cloud.google.com/sdk/docs/install" >&2
  exit 2
fi
shift
repo=${REPO:-$(git remote get-url origin)}
ref=${REF:-$(git rev-parse HEAD)}
nodes=${NODES:-1}
where=(--project="$PROJECT" --zone="$ZONE")

request() {
  local how=(--node-id="$name")
  if ((nodes > 1)); then
    how=(--node-count="$nodes" --node-prefix="$name")
  fi
  if [[ -n ${SPOT:-} ]]; then
    how+=(--spot)
  fi
  gcloud compute tpus queued-resources create "$name" "${where[@]}" "${how[@]}" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

release() {
  gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet || true
}

# everywhere COMMAND: run a command on every host of every slice at the same time.
everywhere() {
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
  python3 -m venv .venv
  .venv/bin/python -m pip install -q -r requirements-tpu.txt -r requirements-gcs.txt"
command=".venv/bin/python -m emu_jax.train --config.workdir=../run $(printf '%q ' "$@")"
train="cd emu && exec $command"

trap release EXIT
trap 'exit 130' INT TERM
failures=0
while true; do
  case $(state) in
    ACTIVE)
      everywhere "$install"
      status=0
      began=$SECONDS
      everywhere "$train" || status=$?
      # A preempted run saves and exits with 0, and the state of its slice changes some time later.
      sleep 60
      if ((status == 0)) && [[ $(state) == ACTIVE ]]; then
        exit 0
      fi
      failures=$((status && SECONDS - began < 900 ? failures + 1 : 0))
      if ((failures == 3)); then
        echo "error: the run failed three times within its first minutes; see its output above" >&2
        exit 1
      fi
      echo "the run ended with status $status; it resumes from its last checkpoint" >&2
      ;;
    NONE) request ;;
    FAILED | SUSPENDED) release ;;
    *) sleep 30 ;;
  esac
done

#!/bin/bash
# The whole experiment on several machines without a scheduler. On the first of them, from the
# repository's root, which must lie at the same path on all, on a file system that they share:
#
#   HOSTS="node1 node2" DEVICES=8 experiments/cluster/torchrun.sh EXP=celeba SCALE=sd14 \
#     DATA=/data/celeba BACKBONE=/models/stable-diffusion-v1-4
#
# `make train` runs here, once; each stage that trains or samples is started by torchrun on every
# host, over ssh (which must ask for no password). One machine needs none of this: `make train
# DEVICES=8` lets Lightning start the processes itself.
set -euo pipefail

if [[ "${1:-}" == "--stage" ]]; then
  # Called back by `make train`, with the command of a stage.
  shift
  hosts=(${HOSTS})
  stage=$(printf '%q ' "$@")
  pids=()
  trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
  for host in "${hosts[@]}"; do
    # -tt: when this ends, so does what it has started there.
    ssh -tt "$host" "cd $(printf '%q' "$PWD") && HF_HUB_OFFLINE=1 INVDIFF_RUN_LOCKED=1 \
      $(printf '%q' "$TORCHRUN") \
      --nnodes=${#hosts[@]} --nproc-per-node=${DEVICES} \
      --rdzv-backend=c10d --rdzv-endpoint=${hosts[0]}:${PORT:-29400} --rdzv-id=${RDZV_ID} \
      --no-python ${stage}" </dev/null &
    pids+=("$!")
  done
  status=0
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  trap - EXIT
  exit "$status"
fi

: "${HOSTS:?names of the machines, the first of which is this one}"
: "${DEVICES:?GPUs a machine}"
export HOSTS DEVICES PORT="${PORT:-29400}" RDZV_ID="invdiff-$$"
export TORCHRUN="${TORCHRUN:-$PWD/.venv/bin/torchrun}"
exec make train "$@" \
  DEVICES="$DEVICES" \
  NUM_NODES="$(wc -w <<<"$HOSTS")" \
  LAUNCHER="bash experiments/cluster/torchrun.sh --stage"

#!/usr/bin/env bash
# Train with several processes, one a GPU (nccl), or on CPU (gloo) where there is none.
#   tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail

PROCESSES=${2:-}
if [ $# -lt 2 ] || ! [[ "$PROCESSES" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 CONFIG PROCESSES [arguments of tools/train.py]" >&2
  [ $# -lt 2 ] || echo "error: PROCESSES is '$PROCESSES', expected a number from 1" >&2
  exit 2
fi
ARGUMENTS=("$1" --launcher pytorch "${@:3}")

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${PORT:-29500}" \
  --nproc_per_node="$PROCESSES" \
  "$(dirname "$0")/train.py" "${ARGUMENTS[@]}"

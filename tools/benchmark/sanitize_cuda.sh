#!/usr/bin/env bash
# Run the CUDA kernels at odd sizes under NVIDIA's compute-sanitizer: no access out of bounds, no race, no barrier that
# some threads miss. Needs a GPU, the CUDA build of the extension, and compute-sanitizer from the CUDA toolkit.
# Not initcheck: it does not see what cuBLAS stores through the tensor memory accelerator, and calls it unwritten.
#   tools/benchmark/sanitize_cuda.sh [memcheck racecheck synccheck]
set -euo pipefail

if ! command -v compute-sanitizer >/dev/null; then
  echo "error: compute-sanitizer is not on PATH; it comes with the CUDA toolkit, in bin/" >&2
  exit 2
fi
cd "$(dirname "$0")/../.."
TOOLS=("$@")
if [ $# -eq 0 ]; then TOOLS=(memcheck racecheck synccheck); fi
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
# without the caching allocator each tensor is an allocation of its own, whose ends the tool sees
for tool in "${TOOLS[@]}"; do
  echo "== $tool"
  status=0
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "${PYTHON:-python}" tests/test_ops/sanitized.py cuda 2>&1 | tee "$LOG" || status=$?
  # racecheck takes the asynchronous copies of cuBLAS's and cuDNN's own kernels for races
  if [ "$tool" = racecheck ] && [ $status -eq 9 ] && ! grep -q 'access at .*mmvmamba' "$LOG"; then
    echo "no hazard in a kernel of mmvmamba; those above are in the kernels of libraries"
    status=0
  fi
  [ $status -eq 0 ] || exit $status
  if ! grep -q 'cases through the kernels' "$LOG"; then
    echo "error: $tool: the program ended before its last case; its closing line is missing above" >&2
    exit 1
  fi
done

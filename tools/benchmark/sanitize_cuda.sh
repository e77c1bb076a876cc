#!/usr/bin/env bash
# Run the CUDA kernels at odd sizes under NVIDIA's compute-sanitizer: no access out of bounds, no race, nothing read
# before it is written. Needs a GPU, the CUDA build of the extension, and compute-sanitizer from the CUDA toolkit.
#   tools/benchmark/sanitize_cuda.sh [memcheck racecheck synccheck initcheck]
set -euo pipefail

if ! command -v compute-sanitizer >/dev/null; then
  echo "error: compute-sanitizer is not on PATH; it comes with the CUDA toolkit, in bin/" >&2
  exit 2
fi
cd "$(dirname "$0")/../.."
TOOLS=("$@")
if [ $# -eq 0 ]; then TOOLS=(memcheck racecheck synccheck initcheck); fi
# without the caching allocator each tensor is an allocation of its own, whose ends the tool sees
for tool in "${TOOLS[@]}"; do
  echo "== $tool"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "${PYTHON:-python}" tests/test_trust/sanitized.py cuda
done

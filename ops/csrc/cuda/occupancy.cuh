// How many blocks of a kernel a processor holds: a grid of just these has no half-empty last round.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

namespace mmvmamba {

template <typename Kernel> int resident_blocks(Kernel kernel, int threads, size_t shared = 0) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
  return std::max(1, blocks);
}

}  // namespace mmvmamba

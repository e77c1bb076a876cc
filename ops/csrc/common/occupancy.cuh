// How many blocks of a kernel a processor holds: a grid of just these has no half-empty last round.
#pragma once

#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <tuple>

namespace mmvmamba {

template <typename Kernel> int resident_blocks(Kernel kernel, int threads, size_t shared = 0) {
  // asking the driver at every launch costs the host more than the launch
  thread_local std::map<std::tuple<const void*, int, int, size_t>, int> known;
  const auto key = std::make_tuple(reinterpret_cast<const void*>(kernel), static_cast<int>(c10::cuda::current_device()),
                                   threads, shared);
  const auto [entry, is_new] = known.try_emplace(key, 1);
  if (is_new) {
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
    entry->second = std::max(1, blocks);
  }
  return entry->second;
}

}  // namespace mmvmamba

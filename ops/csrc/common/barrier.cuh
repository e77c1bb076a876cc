// A barrier of some of a block's warps.
#pragma once

namespace mmvmamba {

// Wait for `threads` threads of the block, a multiple of 32, that name the same barrier, 1 to 15 (0 is that of
// __syncthreads). What they have written to memory before is there after.
__device__ __forceinline__ void barrier_of(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

}  // namespace mmvmamba

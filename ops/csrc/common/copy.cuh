// Copies from global to shared memory in the background.
#pragma once

#include <cstdint>

namespace mmvmamba {

// An address in shared memory as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Copy 4, 8 or 16 bytes to shared memory in the background, or zeros; aligned to their number. A thread that has waited
// sees its own copies.
template <int Bytes> __device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(Bytes),
               "r"(valid ? Bytes : 0)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace mmvmamba

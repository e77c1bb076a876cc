// Launches that begin while the kernel before ends (CUDA C++ Programming Guide, Programmatic Dependent Launch).
//
// From compute capability 9.0 on, the blocks of a kernel can be put on processors that have room as soon as all blocks
// of the kernel before run, rather than when they have ended. That saves the time between two kernels, 1 to 2
// microseconds, a third of what the small ones take. Each kernel launched so first calls begin_kernel().
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <utility>

namespace mmvmamba {

// Wait until the kernel before has ended and its memory is there; allow the next one to be put beside this one.
__device__ __forceinline__ void begin_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether the code of `kernel` that this GPU runs was compiled for architectures that have these instructions, by a
// CUDA version that also records such launches into graphs.
template <typename... Args> bool can_overlap(void (*kernel)(Args...)) {
#if CUDART_VERSION >= 12030
  thread_local std::map<std::pair<int, const void*>, bool> known;
  int device = 0;
  cudaGetDevice(&device);
  const auto [entry, is_new] = known.try_emplace({device, reinterpret_cast<const void*>(kernel)}, false);
  if (is_new) {
    cudaFuncAttributes attributes;
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    entry->second =
        major >= 9 && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }
  return entry->second;
#else
  return false;
#endif
}

// kernel<<<grid, threads, shared, stream>>>(values...), for a kernel that calls begin_kernel().
template <typename... Args, typename... Values>
void launch(void (*kernel)(Args...), dim3 grid, dim3 threads, size_t shared, cudaStream_t stream, Values&&... values) {
#if CUDART_VERSION >= 11080
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &overlap, config.numAttrs = can_overlap(kernel);
  cudaLaunchKernelEx(&config, kernel, std::forward<Values>(values)...);
#else
  kernel<<<grid, threads, shared, stream>>>(std::forward<Values>(values)...);
#endif
}

}  // namespace mmvmamba

// How every kernel is launched: so that it begins while the kernel before ends (CUDA C++ Programming Guide,
// Programmatic Dependent Launch).
//
// From compute capability 9.0 on, the blocks of a kernel can be put on processors that have room as soon as all blocks
// of the kernel before run, rather than when they have ended. That saves the time between two kernels, 1 to 2
// microseconds, a third of what the small ones take. Such a kernel must wait before it reads memory: the two __global__
// functions here do, and there are no others.
//
// A kernel is a type, its body:
//   struct Body {
//     static constexpr int kThreads = ...;  // most threads of a block
//     static constexpr int kBlocks = ...;   // blocks that a processor shall hold, at least; 0 where no matter
//     static __device__ __forceinline__ void run(const Args& args, ...);
//   };
// A large first argument is a reference. Others are values, which the compiler then knows no store to change.
#pragma once

#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

namespace mmvmamba {

// Wait until the kernel before has ended and its memory is there; allow the next one to be put beside this one.
__device__ __forceinline__ void begin_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename Body, typename... Args>
__global__ void __launch_bounds__(Body::kThreads, Body::kBlocks) run_kernel(Args... args) {
  begin_kernel();
  Body::run(args...);
}

// For a first argument that is a reference: it stays where it is.
template <typename Body, typename First, typename... Rest>
__global__ void __launch_bounds__(Body::kThreads, Body::kBlocks)
    run_kernel_in_place(const __grid_constant__ First first, Rest... rest) {
  begin_kernel();
  Body::run(first, rest...);
}

// The block's dynamic shared memory.
template <typename T> __device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// ---- host -----------------------------------------------------------------------------------------------------------
template <typename Body, typename First, typename... Rest> constexpr auto find_kernel(void (*)(First, Rest...)) {
  static_assert(!(std::is_reference<Rest>::value || ...), "only the first argument of a body may be a reference");
  if constexpr (std::is_reference<First>::value) {
    return &run_kernel_in_place<Body, std::remove_cv_t<std::remove_reference_t<First>>, Rest...>;
  } else {
    return &run_kernel<Body, First, Rest...>;
  }
}
// The kernel of a body, with the arguments of its `run`.
template <typename Body> constexpr auto kernel_of = find_kernel<Body>(decltype (&Body::run)(nullptr));

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

// Let blocks of a kernel have more shared memory than they may without asking.
template <typename Kernel> void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 48 << 10) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  }
}

template <typename... Args, typename... Values>
void launch_kernel(void (*kernel)(Args...), dim3 grid, dim3 threads, size_t shared, cudaStream_t stream,
                   Values&&... values) {
  allow_shared(kernel, shared);
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

// Run Body on a grid of blocks of `threads` threads and `shared` bytes of dynamic shared memory.
template <typename Body, typename... Values>
void launch(dim3 grid, dim3 threads, size_t shared, cudaStream_t stream, Values&&... values) {
  launch_kernel(kernel_of<Body>, grid, threads, shared, stream, std::forward<Values>(values)...);
}

// How many blocks of Body a processor holds: a grid of just these has no half-empty last round.
template <typename Body> int resident_blocks(int threads, size_t shared = 0) {
  // asking the driver at every launch costs the host more than the launch
  thread_local std::map<std::tuple<int, int, size_t>, int> known;
  const auto key = std::make_tuple(static_cast<int>(c10::cuda::current_device()), threads, shared);
  const auto [entry, is_new] = known.try_emplace(key, 1);
  if (is_new) {
    int blocks = 0;
    allow_shared(kernel_of<Body>, shared);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_of<Body>, threads, shared);
    entry->second = std::max(1, blocks);
  }
  return entry->second;
}

}  // namespace mmvmamba

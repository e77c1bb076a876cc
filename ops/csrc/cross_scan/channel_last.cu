// Cross-scan and cross-merge, channel-last: a pixel's channels are contiguous and a thread moves up to 16 bytes of them
// between the pixel and its four steps; nothing is transposed. Moves x once and y once.
#include "cross_scan/common.cuh"

namespace mmvmamba {
namespace cross {
namespace {

constexpr int kThreads = 256;

// V holds as many channels as a thread moves.
template <typename V>
struct ScanLastKernel {
  static constexpr int kThreads = cross::kThreads, kBlocks = 0;

  static __device__ __forceinline__ void run(const V* x, V* y, int64_t pixels, int vectors, Map map, Routes routes) {
    const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x, pixel = i / vectors;
    if (pixel >= pixels) return;
    const int length = map.height * map.width, p = pixel % length, v = i % vectors;
    const int row = p / map.width, column = p % map.width;
    const V value = x[i];
#pragma unroll
    for (int k = 0; k < kRoutes; ++k) {
      const int step = step_of(row, column, map.height, map.width, routes.column >> k & 1, routes.reverse >> k & 1);
      y[((pixel - p + step) * kRoutes + k) * vectors + v] = value;
    }
  }
};

template <typename T, int kWidth>
struct MergeLastKernel {
  static constexpr int kThreads = cross::kThreads, kBlocks = 0;

  static __device__ __forceinline__ void run(const Vector<T, kWidth>* y, Vector<T, kWidth>* x, int64_t pixels,
                                             int vectors, Map map, Routes routes) {
    const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x, pixel = i / vectors;
    if (pixel >= pixels) return;
    const int length = map.height * map.width, p = pixel % length, v = i % vectors;
    const int row = p / map.width, column = p % map.width;
    Wide<T> total[kWidth] = {};
#pragma unroll
    for (int k = 0; k < kRoutes; ++k) {
      const int step = step_of(row, column, map.height, map.width, routes.column >> k & 1, routes.reverse >> k & 1);
      const Vector<T, kWidth> value = y[((pixel - p + step) * kRoutes + k) * vectors + v];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) total[e] += widen(value.values[e]);
    }
    Vector<T, kWidth> result;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) result.values[e] = narrow<T>(total[e]);
    x[i] = result;
  }
};

template <typename V>
void scan_last(const void* x, void* y, int64_t vectors, Map map, Routes routes, cudaStream_t stream) {
  const int64_t pixels = map.batch * map.height * map.width;
  launch<ScanLastKernel<V>>(ceil_div(pixels * vectors, kThreads), kThreads, 0, stream, static_cast<const V*>(x),
                            static_cast<V*>(y), pixels, static_cast<int>(vectors), map, routes);
}

template <typename T, int kWidth>
void merge_last(const void* y, void* x, Map map, Routes routes, cudaStream_t stream) {
  using V = Vector<T, kWidth>;
  const int64_t pixels = map.batch * map.height * map.width, vectors = map.channels / kWidth;
  launch<MergeLastKernel<T, kWidth>>(ceil_div(pixels * vectors, kThreads), kThreads, 0, stream,
                                     static_cast<const V*>(y), static_cast<V*>(x), pixels, static_cast<int>(vectors),
                                     map, routes);
}

template <typename T>
void merge_last(const void* y, void* x, Map map, Routes routes, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto address = reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(x);
  if (map.channels % kWidth == 0 && address % 16 == 0) {
    merge_last<T, kWidth>(y, x, map, routes, stream);
  } else {
    merge_last<T, 1>(y, x, map, routes, stream);
  }
}

}  // namespace

void launch_scan_last(const void* x, void* y, int element_size, Map map, Routes routes, cudaStream_t stream) {
  const int64_t bytes = map.channels * element_size;
  const auto bits = reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(x) | static_cast<uintptr_t>(bytes);
  if (bits % 16 == 0) {
    scan_last<uint4>(x, y, bytes / 16, map, routes, stream);
  } else if (element_size == 2) {
    scan_last<uint16_t>(x, y, map.channels, map, routes, stream);
  } else if (element_size == 4) {
    scan_last<uint32_t>(x, y, map.channels, map, routes, stream);
  } else {
    scan_last<uint64_t>(x, y, map.channels, map, routes, stream);
  }
}

void launch_merge_last(const void* y, void* x, Type type, Map map, Routes routes, cudaStream_t stream) {
  if (type == Type::kDouble) return merge_last<double>(y, x, map, routes, stream);
  with_type(type, [&](auto t) { merge_last<decltype(t)>(y, x, map, routes, stream); });
}

}  // namespace cross
}  // namespace mmvmamba

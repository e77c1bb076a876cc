// Cross-scan and cross-merge, channel-last: a pixel's channels are contiguous and a thread moves up to 16 bytes of them
// between the pixel and its four steps; nothing is transposed. Moves x once and y once.
#include "cross_scan/common.cuh"

namespace mmvmamba {
namespace cross {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t items) { return static_cast<unsigned>((items + kThreads - 1) / kThreads); }

// V holds as many channels as a thread moves.
template <typename V>
__global__ void scan_last_kernel(const V* x, V* y, int64_t pixels, int vectors, Map map, Routes routes) {
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

template <typename T, typename acc_t, int kWidth>
__global__ void merge_last_kernel(const Vector<T, kWidth>* y, Vector<T, kWidth>* x, int64_t pixels, int vectors, Map map,
                                  Routes routes) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x, pixel = i / vectors;
  if (pixel >= pixels) return;
  const int length = map.height * map.width, p = pixel % length, v = i % vectors;
  const int row = p / map.width, column = p % map.width;
  acc_t total[kWidth] = {};
#pragma unroll
  for (int k = 0; k < kRoutes; ++k) {
    const int step = step_of(row, column, map.height, map.width, routes.column >> k & 1, routes.reverse >> k & 1);
    const Vector<T, kWidth> value = y[((pixel - p + step) * kRoutes + k) * vectors + v];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) total[e] += widen(value.values[e]);
  }
  Vector<T, kWidth> result;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) narrow(total[e], result.values[e]);
  x[i] = result;
}

template <typename V>
void scan_last(const void* x, void* y, int64_t vectors, Map map, Routes routes, cudaStream_t stream) {
  const int64_t pixels = map.batch * map.height * map.width;
  scan_last_kernel<<<blocks_for(pixels * vectors), kThreads, 0, stream>>>(
      static_cast<const V*>(x), static_cast<V*>(y), pixels, static_cast<int>(vectors), map, routes);
}

template <typename T, typename acc_t, int kWidth>
void merge_last(const void* y, void* x, Map map, Routes routes, cudaStream_t stream) {
  using V = Vector<T, kWidth>;
  const int64_t pixels = map.batch * map.height * map.width, vectors = map.channels / kWidth;
  merge_last_kernel<T, acc_t, kWidth><<<blocks_for(pixels * vectors), kThreads, 0, stream>>>(
      static_cast<const V*>(y), static_cast<V*>(x), pixels, static_cast<int>(vectors), map, routes);
}

template <typename T, typename acc_t>
void merge_last(const void* y, void* x, Map map, Routes routes, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto address = reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(x);
  if (map.channels % kWidth == 0 && address % 16 == 0) {
    merge_last<T, acc_t, kWidth>(y, x, map, routes, stream);
  } else {
    merge_last<T, acc_t, 1>(y, x, map, routes, stream);
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
  switch (type) {
    case Type::kHalf: return merge_last<__half, float>(y, x, map, routes, stream);
    case Type::kBfloat16: return merge_last<__nv_bfloat16, float>(y, x, map, routes, stream);
    case Type::kFloat: return merge_last<float, float>(y, x, map, routes, stream);
    case Type::kDouble: return merge_last<double, double>(y, x, map, routes, stream);
  }
}

}  // namespace cross
}  // namespace mmvmamba

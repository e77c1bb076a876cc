// Kernels of layer_norm and add_layer_norm: `Lanes` lanes own a row of at most 1024 channels, values in registers. They
// go from the last row to the first: the L2 cache holds what the product before wrote last, and then what the one after
// reads first.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>
#include <type_traits>

#include "fused/common/gelu.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace mmvmamba {
namespace norm {

constexpr int kThreads = 256;

// A factor for each sample, whose rows lie together; none is 1.
struct Factors {
  const float* values;
  unsigned rows;  // of a sample

  __device__ __forceinline__ float operator()(int64_t row) const {
    return values == nullptr ? 1.f : values[static_cast<unsigned>(row) / rows];
  }
};

// What is done beside the norm. Nothing;
struct Plain {};

// or after a convolution: its bias is added first (unless null), and GELU applied to the norm.
struct AfterConv {
  const float* shift;
  bool gelu;
};

// or the input is x + factor * branch, which is kept in `sum`;
template <typename In, typename Out> struct Branch {
  const Out* branch;
  In* sum;
  Factors factor;
};

// of which the gradient of the sum joins in, and the branch gets its own, factor * dx.
template <typename In, typename Out> struct BranchGrad {
  const In* dsum;
  Out* dbranch;
  Factors factor;
};

template <typename Beside> constexpr bool kAfterConv = std::is_same<Beside, AfterConv>::value;
template <typename Beside> constexpr bool kResidual = !kAfterConv<Beside> && !std::is_same<Beside, Plain>::value;

// Sums over all rows that backward leaves: for weight and bias, and after a convolution for its bias.
template <typename Beside> constexpr int kSums = kAfterConv<Beside> ? 3 : 2;

template <int Lanes> __device__ __forceinline__ float sum_over_row(float v) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The same lane of every row of a warp.
template <int Lanes> __device__ __forceinline__ float sum_over_rows(float v) {
#pragma unroll
  for (int offset = 16; offset >= Lanes; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Add the convolution's bias to four values.
__device__ __forceinline__ void add_shift(const AfterConv& conv, int channel, float (&v)[4]) {
  if (conv.shift == nullptr) return;
  float shift[4];
  load(conv.shift + channel, shift);
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] += shift[j];
}

// A thread holds `Chunks` times 4 channels of a row: chunk i at channel 4 * (lane + i * Lanes).
template <typename In, typename Out, int Lanes, int Chunks, typename Beside>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const In* x, Beside beside, const float* weight, const float* bias, Out* y, float2* statistics,
                   int64_t rows, int channels, float eps) {
  begin_kernel();
  const int lane = threadIdx.x % Lanes;
  float w[Chunks][4], b[Chunks][4];
#pragma unroll
  for (int i = 0; i < Chunks; ++i) {
    const int channel = 4 * (lane + i * Lanes);
    if (channel < channels) load(weight + channel, w[i]), load(bias + channel, b[i]);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / Lanes);
  // All lanes of a warp take part in the shuffles; a row before the first repeats it and isn't stored.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes); first < rows; first += stride) {
    const int64_t before = rows - 1 - first - threadIdx.x / Lanes, row = max(before, int64_t{0});
    const bool stored = before >= 0;
    const int64_t offset = row * channels;
    float factor = 1.f;
    if constexpr (kResidual<Beside>) factor = beside.factor(row);
    float v[Chunks][4], sum = 0.f;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
        load(x + offset + channel, v[i]);
        if constexpr (kAfterConv<Beside>) add_shift(beside, channel, v[i]);
        if constexpr (kResidual<Beside>) {
          float added[4];
          load(beside.branch + offset + channel, added);
#pragma unroll
          for (int j = 0; j < 4; ++j) v[i][j] = fmaf(factor, added[j], v[i][j]);
          if (stored) store(beside.sum + offset + channel, v[i]);
        }
        sum += v[i][0] + v[i][1] + v[i][2] + v[i][3];
      }
    }
    const float mean = sum_over_row<Lanes>(sum) / channels;
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      if (4 * (lane + i * Lanes) < channels) {
#pragma unroll
        for (int j = 0; j < 4; ++j) squares = fmaf(v[i][j] - mean, v[i][j] - mean, squares);
      }
    }
    const float scale = rsqrtf(sum_over_row<Lanes>(squares) / channels + eps);
    if (!stored) continue;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] = fmaf((v[i][j] - mean) * scale, w[i][j], b[i][j]);
        if constexpr (kAfterConv<Beside>) {
          if (beside.gelu) {
#pragma unroll
            for (int j = 0; j < 4; ++j) v[i][j] = gelu<std::is_same<Out, float>::value>(v[i][j]);
          }
        }
        store(y + offset + channel, v[i]);
      }
    }
    if (lane == 0 && statistics != nullptr) statistics[row] = make_float2(mean, scale);
  }
}

// What backward reads of a row, four values a chunk as they lie in memory.
template <typename In, typename Out, int Lanes, int Chunks> struct Row {
  using WordX = typename Word<4 * sizeof(In)>::Type;
  using WordY = typename Word<4 * sizeof(Out)>::Type;
  WordX x[Chunks];
  WordY dy[Chunks];
  float2 mean_scale;

  __device__ __forceinline__ void fetch(const In* x_of, const Out* dy_of, const float2* statistics, int64_t row,
                                        int channels) {
    mean_scale = statistics[row];
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (threadIdx.x % Lanes + i * Lanes);
      if (channel < channels) {
        x[i] = *reinterpret_cast<const WordX*>(x_of + row * channels + channel);
        dy[i] = *reinterpret_cast<const WordY*>(dy_of + row * channels + channel);
      }
    }
  }
};

// A warp waits for memory once a row: `dsum` is read before the sums over the row, and where registers allow it the
// next row's x and dy as well. 16 warps a processor with these in flight beat 24 without (H100, 2.7 and 2.5 TB/s).
template <typename In, typename Out, int Lanes, int Chunks, typename Beside>
__global__ void __launch_bounds__(kThreads, Chunks <= 4 ? 2 : 1)
    backward_kernel(const Out* dy, const In* x, Beside beside, const float* weight, const float* bias,
                    const float2* statistics, In* dx, float* partial, int64_t rows, int channels) {
  begin_kernel();
  extern __shared__ float sums[];  // [kSums][channels]
  constexpr bool kAhead = Chunks <= 3 || Chunks == 6;
  const int lane = threadIdx.x % Lanes;
  float w[Chunks][4], own[kSums<Beside>][Chunks][4] = {};
#pragma unroll
  for (int i = 0; i < Chunks; ++i) {
    const int channel = 4 * (lane + i * Lanes);
    if (channel < channels) load(weight + channel, w[i]);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / Lanes);
  // All lanes of a warp take part in the shuffles; a row before the first repeats it and isn't stored.
  const auto row_of = [&](int64_t first) { return max(rows - 1 - first - threadIdx.x / Lanes, int64_t{0}); };
  Row<In, Out, Lanes, Chunks> input;
  int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes);
  if (kAhead && first < rows) input.fetch(x, dy, statistics, row_of(first), channels);
  for (; first < rows; first += stride) {
    const int64_t row = row_of(first);
    const bool stored = first + threadIdx.x / Lanes < rows;
    if (!kAhead) input.fetch(x, dy, statistics, row, channels);
    const float2 mean_scale = input.mean_scale;
    float normal[Chunks][4], grad[Chunks][4], dsum[kResidual<Beside> ? Chunks : 1][4], dot = 0.f, sum = 0.f;
    if constexpr (kResidual<Beside>) {
#pragma unroll
      for (int i = 0; i < Chunks; ++i) {
        const int channel = 4 * (lane + i * Lanes);
        if (channel < channels) load(beside.dsum + row * channels + channel, dsum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      load(reinterpret_cast<const In*>(&input.x[i]), normal[i]);
      load(reinterpret_cast<const Out*>(&input.dy[i]), grad[i]);
    }
    if (kAhead && first + stride < rows) input.fetch(x, dy, statistics, row_of(first + stride), channels);
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
        if constexpr (kAfterConv<Beside>) add_shift(beside, channel, normal[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) normal[i][j] = (normal[i][j] - mean_scale.x) * mean_scale.y;
        if constexpr (kAfterConv<Beside>) {
          if (beside.gelu) {
            float b[4];
            load(bias + channel, b);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              grad[i][j] *= gelu_and_slope<std::is_same<Out, float>::value>(fmaf(normal[i][j], w[i][j], b[j])).y;
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (stored) {
            own[0][i][j] = fmaf(grad[i][j], normal[i][j], own[0][i][j]);
            own[1][i][j] += grad[i][j];
          }
          grad[i][j] *= w[i][j];
          dot = fmaf(grad[i][j], normal[i][j], dot);
          sum += grad[i][j];
        }
      }
    }
    dot = sum_over_row<Lanes>(dot) / channels;
    sum = sum_over_row<Lanes>(sum) / channels;
    if (!stored) continue;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
#pragma unroll
        for (int j = 0; j < 4; ++j) grad[i][j] = mean_scale.y * (grad[i][j] - sum - normal[i][j] * dot);
        if constexpr (kResidual<Beside>) {
#pragma unroll
          for (int j = 0; j < 4; ++j) grad[i][j] += dsum[i][j];
        }
        if constexpr (kAfterConv<Beside>) {
#pragma unroll
          for (int j = 0; j < 4; ++j) own[2][i][j] += grad[i][j];
        }
        store(dx + row * channels + channel, grad[i]);
        if constexpr (kResidual<Beside>) {
          const float factor = beside.factor(row);
#pragma unroll
          for (int j = 0; j < 4; ++j) grad[i][j] *= factor;
          store(beside.dbranch + row * channels + channel, grad[i]);
        }
      }
    }
  }
  // The rows of a warp, then the warps, in a fixed order.
#pragma unroll
  for (int k = 0; k < kSums<Beside>; ++k) {
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) own[k][i][j] = sum_over_rows<Lanes>(own[k][i][j]);
    }
  }
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (threadIdx.x / 32 == warp && threadIdx.x % 32 < Lanes) {
#pragma unroll
      for (int i = 0; i < Chunks; ++i) {
        const int channel = 4 * (lane + i * Lanes);
        if (channel < channels) {
#pragma unroll
          for (int k = 0; k < kSums<Beside>; ++k) {
            float* to = sums + k * channels + channel;
#pragma unroll
            for (int j = 0; j < 4; ++j) to[j] = warp ? to[j] + own[k][i][j] : own[k][i][j];
          }
        }
      }
    }
    __syncthreads();
  }
  const int size = kSums<Beside> * channels;
  for (int i = threadIdx.x; i < size; i += kThreads) partial[static_cast<int64_t>(blockIdx.x) * size + i] = sums[i];
}

}  // namespace norm
}  // namespace mmvmamba

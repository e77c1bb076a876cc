// Kernels of layer_norm and add_layer_norm: `Lanes` lanes own a row of at most 1024 channels, values in registers. They
// go from the last row to the first: the L2 cache holds what the product before wrote last, and then what the one after
// reads first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/ceil_div.h"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "fused/common/gelu.cuh"
#include "fused/layer_norm/kernels.h"

namespace mmvmamba {
namespace norm {

constexpr int kThreads = 256;

// The factor of a row.
__device__ __forceinline__ float factor_of(const Factors& factors, int64_t row) {
  return factors.values == nullptr ? 1.f : factors.values[static_cast<unsigned>(row) / factors.rows];
}

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
  Factors factors;
};

// of which the gradient of the sum joins in, and the branch gets its own, factor * dx.
template <typename In, typename Out> struct BranchGrad {
  const In* dsum;
  Out* dbranch;
  Factors factors;
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
template <typename In, typename Out, int Lanes, int Chunks, typename Beside> struct ForwardKernel {
  static constexpr int kThreads = norm::kThreads, kBlocks = 0;

  static __device__ __forceinline__ void run(const In* x, Beside beside, const float* weight, const float* bias, Out* y,
                                             float2* statistics, int64_t rows, int channels, float eps) {
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
      if constexpr (kResidual<Beside>) factor = factor_of(beside.factors, row);
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
};

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
template <typename In, typename Out, int Lanes, int Chunks, typename Beside> struct BackwardKernel {
  static constexpr int kThreads = norm::kThreads, kBlocks = Chunks <= 4 ? 2 : 1;
  static constexpr bool kAhead = Chunks <= 3 || Chunks == 6;
  static constexpr int kSums = norm::kSums<Beside>;
  static constexpr bool kExact = std::is_same<Out, float>::value;

  static __device__ __forceinline__ int channel_of(int chunk) { return 4 * (threadIdx.x % Lanes + chunk * Lanes); }

  // From x to the normalised values, and from the gradient of the output to that of the norm.
  static __device__ __forceinline__ void normalise(const Beside& beside, const float (&w)[4], const float* bias,
                                                   int channel, const float2& mean_scale, float (&normal)[4],
                                                   float (&grad)[4]) {
    if constexpr (kAfterConv<Beside>) add_shift(beside, channel, normal);
#pragma unroll
    for (int j = 0; j < 4; ++j) normal[j] = (normal[j] - mean_scale.x) * mean_scale.y;
    if constexpr (kAfterConv<Beside>) {
      if (beside.gelu) {
        float b[4];
        load(bias + channel, b);
#pragma unroll
        for (int j = 0; j < 4; ++j) grad[j] *= gelu_and_slope<kExact>(fmaf(normal[j], w[j], b[j])).y;
      }
    }
  }

  // The gradients of a row to memory; the sums for a convolution's bias go to `own`.
  static __device__ __forceinline__ void store_row(const Beside& beside, In* dx, int64_t row, int channels, float scale,
                                                   float sum, float dot, const float (&normal)[Chunks][4],
                                                   float (&grad)[Chunks][4],
                                                   const float (&dsum)[kResidual<Beside> ? Chunks : 1][4],
                                                   float (&own)[kSums][Chunks][4]) {
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = channel_of(i);
      if (channel < channels) {
#pragma unroll
        for (int j = 0; j < 4; ++j) grad[i][j] = scale * (grad[i][j] - sum - normal[i][j] * dot);
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
          const float factor = factor_of(beside.factors, row);
#pragma unroll
          for (int j = 0; j < 4; ++j) grad[i][j] *= factor;
          store(beside.dbranch + row * channels + channel, grad[i]);
        }
      }
    }
  }

  // The sums of the block's threads: the rows of a warp, then the warps, in a fixed order.
  static __device__ __forceinline__ void reduce(float (&own)[kSums][Chunks][4], float* partial, int channels) {
    float* sums = shared_memory<float>();  // [kSums][channels]
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
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
          const int channel = channel_of(i);
          if (channel < channels) {
#pragma unroll
            for (int k = 0; k < kSums; ++k) {
              float* to = sums + k * channels + channel;
#pragma unroll
              for (int j = 0; j < 4; ++j) to[j] = warp ? to[j] + own[k][i][j] : own[k][i][j];
            }
          }
        }
      }
      __syncthreads();
    }
    const int size = kSums * channels;
    for (int i = threadIdx.x; i < size; i += kThreads) partial[static_cast<int64_t>(blockIdx.x) * size + i] = sums[i];
  }

  static __device__ __forceinline__ void run(const Out* dy, const In* x, Beside beside, const float* weight,
                                             const float* bias, const float2* statistics, In* dx, float* partial,
                                             int64_t rows, int channels) {
    float w[Chunks][4], own[kSums][Chunks][4] = {};
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      if (channel_of(i) < channels) load(weight + channel_of(i), w[i]);
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
          if (channel_of(i) < channels) load(beside.dsum + row * channels + channel_of(i), dsum[i]);
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
        if (channel_of(i) < channels) {
          normalise(beside, w[i], bias, channel_of(i), mean_scale, normal[i], grad[i]);
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
      if (stored) store_row(beside, dx, row, channels, mean_scale.y, sum, dot, normal, grad, dsum, own);
    }
    reduce(own, partial, channels);
  }
};

// ---- host -----------------------------------------------------------------------------------------------------------
// Call f(lanes, chunks) with compile-time numbers that hold `channels`, exactly for the usual widths. In a lambda
// inside f use their values: CUDA 11.8's nvcc crashes at the numbers themselves.
template <typename F> auto with_shape(int channels, F f) {
  using std::integral_constant;
  using Three = integral_constant<int, 3>;
  using Warp = integral_constant<int, 32>;
  if (channels <= 48) return f(integral_constant<int, 4>(), Three());
  if (channels <= 96) return f(integral_constant<int, 8>(), Three());
  if (channels <= 128) return f(Warp(), integral_constant<int, 1>());
  if (channels <= 192) return f(integral_constant<int, 16>(), Three());
  if (channels <= 256) return f(Warp(), integral_constant<int, 2>());
  if (channels <= 384) return f(Warp(), Three());
  if (channels <= 512) return f(Warp(), integral_constant<int, 4>());
  if (channels <= 768) return f(Warp(), integral_constant<int, 6>());
  return f(Warp(), integral_constant<int, 8>());
}

// A branch has the type of the output, and a sum holds it without rounding.
template <typename In, typename Out>
constexpr bool kCanAdd = std::is_same<In, Out>::value || std::is_same<In, float>::value;

// The map after a convolution has the convolution's type; the norm keeps it or gives float.
template <typename In, typename Out>
constexpr bool kCanFollow = std::is_same<In, Out>::value || std::is_same<Out, float>::value;

// Blocks for which there are rows, at most `resident` a processor.
inline int64_t blocks_for(int64_t rows, int lanes, int processors, int resident) {
  return std::max<int64_t>(1, std::min(ceil_div(rows * lanes, kThreads), int64_t{processors} * resident));
}

template <typename In, typename Out> void Kernels<In, Out>::forward(const Forward& p, cudaStream_t stream) {
  with_shape(p.channels, [&](auto lanes, auto chunks) {
    constexpr int Lanes = decltype(lanes)::value, Chunks = decltype(chunks)::value;
    const auto run = [&](auto beside) {
      using Kernel = ForwardKernel<In, Out, Lanes, Chunks, decltype(beside)>;
      const int64_t blocks = blocks_for(p.rows, Lanes, p.processors, resident_blocks<Kernel>(kThreads));
      launch<Kernel>(blocks, kThreads, 0, stream, static_cast<const In*>(p.x), beside, p.weight, p.bias,
                     static_cast<Out*>(p.y), p.statistics, p.rows, p.channels, p.eps);
    };
    if constexpr (kCanAdd<In, Out>) {
      if (p.branch != nullptr) {
        return run(Branch<In, Out>{static_cast<const Out*>(p.branch), static_cast<In*>(p.sum), p.factors});
      }
    }
    if constexpr (kCanFollow<In, Out>) {
      if (p.shift != nullptr || p.gelu) return run(AfterConv{p.shift, p.gelu});
    }
    run(Plain{});
  });
}

template <typename In, typename Out>
void Kernels<In, Out>::backward(const Backward& p, const AllocatePartial& allocate, cudaStream_t stream) {
  with_shape(p.channels, [&](auto lanes, auto chunks) {
    constexpr int Lanes = decltype(lanes)::value, Chunks = decltype(chunks)::value;
    const auto run = [&](auto beside) {
      using Kernel = BackwardKernel<In, Out, Lanes, Chunks, decltype(beside)>;
      const size_t shared = Kernel::kSums * p.channels * sizeof(float);
      const int64_t blocks = blocks_for(p.rows, Lanes, p.processors, resident_blocks<Kernel>(kThreads, shared));
      float* partial = allocate(blocks, Kernel::kSums * p.channels);
      launch<Kernel>(blocks, kThreads, shared, stream, static_cast<const Out*>(p.dy), static_cast<const In*>(p.x),
                     beside, p.weight, p.bias, p.statistics, static_cast<In*>(p.dx), partial, p.rows, p.channels);
    };
    if constexpr (kCanAdd<In, Out>) {
      if (p.dsum != nullptr) {
        return run(BranchGrad<In, Out>{static_cast<const In*>(p.dsum), static_cast<Out*>(p.dbranch), p.factors});
      }
    }
    if constexpr (kCanFollow<In, Out>) {
      if (p.shift != nullptr || p.gelu) return run(AfterConv{p.shift, p.gelu});
    }
    run(Plain{});
  });
}

}  // namespace norm
}  // namespace mmvmamba

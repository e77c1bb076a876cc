// Kernels of layer_norm and add_layer_norm: `Lanes` lanes own a row of at most 1024 channels, values in registers.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "vector.cuh"

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

template <typename In, typename Out> struct Branch {
  const Out* branch;
  In* sum;
  Factors factor;
};

template <typename In, typename Out> struct BranchGrad {
  const In* dsum;
  Out* dbranch;
  Factors factor;
};

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

// A thread holds `Chunks` times 4 channels of a row: chunk i at channel 4 * (lane + i * Lanes).
// With `Residual` the input is x + factor * branch, which is kept in `sum`.
template <typename In, typename Out, int Lanes, int Chunks, bool Residual>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const In* x, Branch<In, Out> residual, const float* weight, const float* bias, Out* y,
                   float2* statistics, int64_t rows, int channels, float eps) {
  const int lane = threadIdx.x % Lanes;
  float w[Chunks][4], b[Chunks][4];
#pragma unroll
  for (int i = 0; i < Chunks; ++i) {
    const int channel = 4 * (lane + i * Lanes);
    if (channel < channels) load(weight + channel, w[i]), load(bias + channel, b[i]);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / Lanes);
  // All lanes of a warp take part in the shuffles; a row beyond the last repeats it and isn't stored.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes); first < rows; first += stride) {
    const int64_t row = first + threadIdx.x / Lanes;
    const int64_t offset = (row < rows ? row : rows - 1) * channels;
    const float factor = Residual ? residual.factor(row < rows ? row : rows - 1) : 1.f;
    float v[Chunks][4], sum = 0.f;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
        load(x + offset + channel, v[i]);
        if constexpr (Residual) {
          float added[4];
          load(residual.branch + offset + channel, added);
#pragma unroll
          for (int j = 0; j < 4; ++j) v[i][j] = fmaf(factor, added[j], v[i][j]);
          if (row < rows) store(residual.sum + offset + channel, v[i]);
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
    if (row >= rows) continue;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] = fmaf((v[i][j] - mean) * scale, w[i][j], b[i][j]);
        store(y + row * channels + channel, v[i]);
      }
    }
    if (lane == 0 && statistics != nullptr) statistics[row] = make_float2(mean, scale);
  }
}

// With `Residual` the gradient of the sum joins in, and the branch gets its own, factor * dx.
template <typename In, typename Out, int Lanes, int Chunks, bool Residual>
__global__ void __launch_bounds__(kThreads, Chunks == 3 ? 3 : 1)
    backward_kernel(const Out* dy, const In* x, BranchGrad<In, Out> residual, const float* weight,
                    const float2* statistics, In* dx, float* partial, int64_t rows, int channels) {
  extern __shared__ float sums[];  // [2][channels]
  const int lane = threadIdx.x % Lanes;
  float w[Chunks][4], dw[Chunks][4] = {}, db[Chunks][4] = {};
#pragma unroll
  for (int i = 0; i < Chunks; ++i) {
    const int channel = 4 * (lane + i * Lanes);
    if (channel < channels) load(weight + channel, w[i]);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / Lanes);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes); first < rows; first += stride) {
    const int64_t row = first + threadIdx.x / Lanes, valid = row < rows ? row : rows - 1;
    const float2 mean_scale = statistics[valid];
    float normal[Chunks][4], grad[Chunks][4], dot = 0.f, sum = 0.f;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
        load(x + valid * channels + channel, normal[i]);
        load(dy + valid * channels + channel, grad[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          normal[i][j] = (normal[i][j] - mean_scale.x) * mean_scale.y;
          if (row < rows) {
            dw[i][j] = fmaf(grad[i][j], normal[i][j], dw[i][j]);
            db[i][j] += grad[i][j];
          }
          grad[i][j] *= w[i][j];
          dot = fmaf(grad[i][j], normal[i][j], dot);
          sum += grad[i][j];
        }
      }
    }
    dot = sum_over_row<Lanes>(dot) / channels;
    sum = sum_over_row<Lanes>(sum) / channels;
    if (row >= rows) continue;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
#pragma unroll
        for (int j = 0; j < 4; ++j) grad[i][j] = mean_scale.y * (grad[i][j] - sum - normal[i][j] * dot);
        if constexpr (Residual) {
          float dsum[4];
          load(residual.dsum + row * channels + channel, dsum);
#pragma unroll
          for (int j = 0; j < 4; ++j) grad[i][j] += dsum[j];
        }
        store(dx + row * channels + channel, grad[i]);
        if constexpr (Residual) {
          const float factor = residual.factor(row);
#pragma unroll
          for (int j = 0; j < 4; ++j) grad[i][j] *= factor;
          store(residual.dbranch + row * channels + channel, grad[i]);
        }
      }
    }
  }
  // The rows of a warp, then the warps, in a fixed order.
#pragma unroll
  for (int i = 0; i < Chunks; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) dw[i][j] = sum_over_rows<Lanes>(dw[i][j]), db[i][j] = sum_over_rows<Lanes>(db[i][j]);
  }
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (threadIdx.x / 32 == warp && threadIdx.x % 32 < Lanes) {
#pragma unroll
      for (int i = 0; i < Chunks; ++i) {
        const int channel = 4 * (lane + i * Lanes);
        if (channel < channels) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sums[channel + j] = warp ? sums[channel + j] + dw[i][j] : dw[i][j];
            sums[channels + channel + j] = warp ? sums[channels + channel + j] + db[i][j] : db[i][j];
          }
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < 2 * channels; i += kThreads) partial[blockIdx.x * 2 * channels + i] = sums[i];
}

}  // namespace norm
}  // namespace mmvmamba

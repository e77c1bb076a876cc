// Shared by the cross-scan kernels of both layouts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cross_scan/kernels.h"

namespace mmvmamba {
namespace cross {

// The step at which a route passes pixel (row, column).
__device__ inline int step_of(int row, int column, int height, int width, bool by_column, bool reverse) {
  const int step = by_column ? column * height + row : row * width + column;
  return reverse ? height * width - 1 - step : step;
}

// torch compiles without the implicit conversions of the half types.
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ inline void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ inline void narrow(float v, float& to) { to = v; }
__device__ inline void narrow(double v, double& to) { to = v; }

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

}  // namespace cross
}  // namespace mmvmamba

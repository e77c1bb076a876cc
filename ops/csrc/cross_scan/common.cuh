// Shared by the cross-scan kernels of both layouts.
#pragma once

#include "common/ceil_div.h"
#include "common/convert.cuh"
#include "common/launch.cuh"
#include "cross_scan/kernels.h"

namespace mmvmamba {
namespace cross {

// The step at which a route passes pixel (row, column).
__device__ __forceinline__ int step_of(int row, int column, int height, int width, bool by_column, bool reverse) {
  const int step = by_column ? column * height + row : row * width + column;
  return reverse ? height * width - 1 - step : step;
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

}  // namespace cross
}  // namespace mmvmamba

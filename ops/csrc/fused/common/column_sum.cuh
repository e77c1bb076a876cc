// The walk of a block over a matrix whose columns it sums: `Width` columns a thread, rows in strides.
#pragma once

#include <ATen/cuda/CUDAContext.h>

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"

namespace mmvmamba {

constexpr int kSumThreads = 256;

struct SumShape {
  int lanes;           // threads side by side
  int column_blocks;   // blocks side by side
  int64_t row_blocks;  // blocks below one another: rows of the partial sums

  dim3 grid() const { return dim3(static_cast<unsigned>(column_blocks), static_cast<unsigned>(row_blocks)); }
};

// About `blocks` a processor, but no more below one another than there are rows for.
template <int Width> SumShape sum_shape(int64_t rows, int64_t columns, int blocks) {
  const int64_t threads = columns / Width;
  SumShape shape;
  shape.column_blocks = static_cast<int>(ceil_div(threads, 64));
  shape.lanes = static_cast<int>(ceil_div(threads, shape.column_blocks));
  const int64_t rows_at_once = kSumThreads / shape.lanes;
  const int64_t most = int64_t{blocks} * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  shape.row_blocks = std::max<int64_t>(
      1, std::min(ceil_div(rows, rows_at_once), std::min<int64_t>(most / shape.column_blocks, 65535)));
  return shape;
}

// A thread's columns and rows.
template <int Width> struct SumPlace {
  bool active;
  int lane, owner, owners, lanes, column;
  int64_t first_row, row_stride;

  __device__ __forceinline__ SumPlace(const SumShape& shape, int columns) {
    lanes = shape.lanes, owners = kSumThreads / lanes;
    lane = threadIdx.x % lanes, owner = threadIdx.x / lanes;
    column = Width * (blockIdx.x * lanes + lane);
    active = owner < owners && column < columns;
    first_row = static_cast<int64_t>(blockIdx.y) * owners + owner;
    row_stride = static_cast<int64_t>(gridDim.y) * owners;
  }

  // Add the sums of a block's threads, in their order, and leave them in the block's row of `partial`.
  __device__ __forceinline__ void leave(const float (&sum)[Width], float* partial, int columns) const {
    __shared__ float sums[Width][kSumThreads];
#pragma unroll
    for (int j = 0; j < Width; ++j) sums[j][threadIdx.x] = sum[j];
    __syncthreads();
    if (!active || owner != 0) return;
    float* to = partial + static_cast<int64_t>(blockIdx.y) * columns + column;
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      float total = 0.f;
      for (int i = 0; i < owners; ++i) total += sums[j][i * lanes + lane];
      to[j] = total;
    }
  }
};

}  // namespace mmvmamba

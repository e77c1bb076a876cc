// Sums over rows (see column_sum.h). A thread adds a few columns over many rows in registers; the threads of a block
// that share columns meet in shared memory, the blocks in a small matrix of partial sums, each in a fixed order.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "common/allocate.h"
#include "common/ceil_div.h"
#include "common/launch.cuh"
#include "common/type_of.h"
#include "common/vector.cuh"
#include "fused/common/column_sum.cuh"
#include "fused/common/column_sum.h"

namespace mmvmamba {
namespace {

constexpr int kColumns = 32, kRows = 32;  // of a block of AddRowsKernel
constexpr int kMostParts = 4;

struct Part {
  const float* from;
  float* to;
  int rows, pitch, columns;
  unsigned first_block;
};
struct Parts {
  Part of[kMostParts];
  int count;
};

struct AddRowsKernel {
  static constexpr int kThreads = kColumns * kRows, kBlocks = 0;

  static __device__ __forceinline__ void run(const Parts& parts) {
    __shared__ float sums[kRows][kColumns + 1];
    int which = 0;
    while (which + 1 < parts.count && blockIdx.x >= parts.of[which + 1].first_block) ++which;
    const Part& part = parts.of[which];
    const int column = (blockIdx.x - part.first_block) * kColumns + threadIdx.x;
    float sum = 0.f;
    if (column < part.columns) {
#pragma unroll 8
      for (int row = threadIdx.y; row < part.rows; row += kRows) {
        sum += part.from[static_cast<int64_t>(row) * part.pitch + column];
      }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    for (int half = kRows / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.y < half) sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + half][threadIdx.x];
    }
    if (threadIdx.y == 0 && column < part.columns) part.to[column] = sums[0][threadIdx.x];
  }
};

template <typename T, int Width>
struct ColumnSumKernel {
  static constexpr int kThreads = kSumThreads, kBlocks = 0;

  static __device__ __forceinline__ void run(const T* x, float* partial, int64_t rows, int columns, SumShape shape) {
    const SumPlace<Width> place(shape, columns);
    float sum[Width] = {};
    if (place.active) {
#pragma unroll 4
      for (int64_t row = place.first_row; row < rows; row += place.row_stride) {
        float v[Width];
        load(x + row * columns + place.column, v);
#pragma unroll
        for (int j = 0; j < Width; ++j) sum[j] += v[j];
      }
    }
    place.leave(sum, partial, columns);
  }
};

template <typename T, int Width> Columns run_column_sum(const at::Tensor& x) {
  const int64_t columns = x.size(-1), rows = x.numel() / columns;
  const SumShape shape = sum_shape<Width>(rows, columns, resident_blocks<ColumnSumKernel<T, Width>>(kSumThreads));
  at::Tensor partial = allocate({shape.row_blocks, columns}, x.options().dtype(at::kFloat));
  launch<ColumnSumKernel<T, Width>>(shape.grid(), kSumThreads, 0, at::cuda::getCurrentCUDAStream(),
                                    static_cast<const T*>(x.data_ptr()), partial.data_ptr<float>(), rows,
                                    static_cast<int>(columns), shape);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {partial, 0, columns};
}

template <typename T, int Width>
struct AddBiasKernel {
  static constexpr int kThreads = kSumThreads, kBlocks = 0;

  static __device__ __forceinline__ void run(T* x, const float* bias, int64_t rows, int columns, SumShape shape) {
    const SumPlace<Width> place(shape, columns);
    if (!place.active) return;
    float b[Width];
    load(bias + place.column, b);
#pragma unroll 4
    for (int64_t row = place.first_row; row < rows; row += place.row_stride) {
      float v[Width];
      load(x + row * columns + place.column, v);
#pragma unroll
      for (int j = 0; j < Width; ++j) v[j] += b[j];
      store(x + row * columns + place.column, v);
    }
  }
};

template <typename T, int Width> void run_add_bias(const at::Tensor& x, const at::Tensor& bias) {
  const int64_t columns = x.size(-1), rows = x.numel() / columns;
  const SumShape shape = sum_shape<Width>(rows, columns, resident_blocks<AddBiasKernel<T, Width>>(kSumThreads));
  launch<AddBiasKernel<T, Width>>(shape.grid(), kSumThreads, 0, at::cuda::getCurrentCUDAStream(),
                                  static_cast<T*>(x.data_ptr()), bias.data_ptr<float>(), rows,
                                  static_cast<int>(columns), shape);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T> void run_add_bias(const at::Tensor& x, const at::Tensor& bias) {
  x.size(-1) % 8 == 0 ? run_add_bias<T, 8>(x, bias) : run_add_bias<T, 4>(x, bias);
}

template <typename T> Columns run_column_sum(const at::Tensor& x) {
  return x.size(-1) % 8 == 0 ? run_column_sum<T, 8>(x) : run_column_sum<T, 4>(x);
}

}  // namespace

std::vector<at::Tensor> add_rows(const std::vector<Columns>& addends) {
  TORCH_CHECK(addends.size() <= kMostParts, "add_rows: ", addends.size(), " parts, expected at most ", kMostParts);
  std::vector<at::Tensor> sums;
  Parts parts{};
  unsigned blocks = 0;
  for (const Columns& c : addends) {
    sums.push_back(allocate({c.count}, c.partial.options()));
    const int64_t rows = c.partial.size(0);
    parts.of[parts.count++] = {
        c.partial.data_ptr<float>() + c.first,      sums.back().data_ptr<float>(), static_cast<int>(rows),
        static_cast<int>(c.partial.numel() / rows), static_cast<int>(c.count),     blocks};
    blocks += static_cast<unsigned>(ceil_div(c.count, kColumns));
  }
  launch<AddRowsKernel>(blocks, dim3(kColumns, kRows), 0, at::cuda::getCurrentCUDAStream(), parts);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return sums;
}

namespace {

void check(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.size(-1) % 4 == 0, "x must be contiguous, with a multiple of 4 columns");
}

}  // namespace

Columns partial_column_sum(const at::Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  check(x);
  return with_type(type_of("column_sum", x.scalar_type()), [&](auto t) { return run_column_sum<decltype(t)>(x); });
}

at::Tensor column_sum(const at::Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  return add_rows({partial_column_sum(x)})[0];
}

void add_bias_(const at::Tensor& x, const at::Tensor& bias) {
  const c10::cuda::CUDAGuard guard(x.device());
  check(x);
  TORCH_CHECK(bias.scalar_type() == at::kFloat && bias.is_contiguous() && bias.numel() == x.size(-1),
              "bias must be contiguous float32, an element a column");
  with_type(type_of("add_bias", x.scalar_type()), [&](auto t) { run_add_bias<decltype(t)>(x, bias); });
}

}  // namespace mmvmamba

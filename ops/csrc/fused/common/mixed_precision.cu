#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <torch/version.h>

#include <limits>

#include "common/allocate.h"
#include "common/ceil_div.h"
#include "common/dense.h"
#include "common/launch.cuh"
#include "common/type_of.h"
#include "common/vector.cuh"
#include "fused/common/mixed_precision.h"

namespace mmvmamba {
namespace {

using at::Tensor;

constexpr int kCastThreads = 256;
constexpr int kTogether = 4;                      // elements of a thread
constexpr int kChunk = kTogether * kCastThreads;  // of a block

// Tensors cast by one launch, contiguous. Those with `rows` are stacks of matrices, each to be transposed; the others
// begin at multiples of 16 bytes.
struct Casts {
  const void* from[kMostCasts];
  void* to[kMostCasts];
  int64_t sizes[kMostCasts], first_block[kMostCasts + 1];
  unsigned rows[kMostCasts], columns[kMostCasts];
  int count;

  void add(const Tensor& source, const Tensor& result, int64_t source_rows = 0, int64_t source_columns = 0) {
    TORCH_CHECK(source_rows == 0 || source.numel() <= std::numeric_limits<unsigned>::max(), "a weight of ",
                source.sizes(), " is too large to be transposed");
    from[count] = source.data_ptr(), to[count] = result.data_ptr(), sizes[count] = source.numel();
    rows[count] = static_cast<unsigned>(source_rows), columns[count] = static_cast<unsigned>(source_columns);
    first_block[count + 1] = first_block[count] + ceil_div(source.numel(), kChunk);
    ++count;
  }
};

template <typename From, typename To> struct CastKernel {
  static constexpr int kThreads = kCastThreads, kBlocks = 0;

  static __device__ __forceinline__ void run(const Casts& casts) {
    int which = 0;
    while (static_cast<int64_t>(blockIdx.x) >= casts.first_block[which + 1]) ++which;
    const From* from = static_cast<const From*>(casts.from[which]);
    To* to = static_cast<To*>(casts.to[which]);
    const int64_t begin = (blockIdx.x - casts.first_block[which]) * kChunk;
    const int64_t size = casts.sizes[which];
    const unsigned rows = casts.rows[which], columns = casts.columns[which];
    if (rows == 0) {
      const int64_t first = begin + threadIdx.x * kTogether;
      if (first + kTogether <= size) {
        float v[kTogether];
        load(from + first, v);
        store(to + first, v);
      } else {
        for (int64_t at = first; at < size; ++at) to[at] = narrow<To>(widen(from[at]));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int64_t at = begin + i * kThreads + threadIdx.x;
      if (at >= size) continue;
      const unsigned row = static_cast<unsigned>(at) / columns, matrix = row / rows;
      const int64_t place =
          static_cast<int64_t>(matrix) * rows * columns + (static_cast<unsigned>(at) % columns) * rows + row % rows;
      to[place] = narrow<To>(widen(from[at]));
    }
  }
};

void run(const Casts& casts, at::ScalarType from_type, at::ScalarType to_type) {
  const int64_t blocks = casts.first_block[casts.count];
  if (blocks == 0) return;
  with_type(type_of("cast", from_type), [&](auto from) {
    with_type(type_of("cast", to_type), [&](auto to) {
      launch<CastKernel<decltype(from), decltype(to)>>(static_cast<unsigned>(blocks), kCastThreads, 0,
                                                       at::cuda::getCurrentCUDAStream(), casts);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

}  // namespace

std::vector<Tensor> cast(std::vector<Tensor> tensors, at::ScalarType dtype, size_t transposed) {
  TORCH_CHECK(tensors.size() <= kMostCasts, "cast: ", tensors.size(), " tensors, expected at most ", kMostCasts);
  const at::ScalarType type = tensors[0].scalar_type();
  if (type == dtype && transposed < tensors.size()) tensors[transposed] = tensors[transposed].t();
  for (Tensor& tensor : tensors) tensor = dense(tensor);
  if (type == dtype) return tensors;
  Casts casts{};
  std::vector<Tensor> results;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto options = tensors[i].options().dtype(dtype);
    if (i == transposed) {
      const int64_t rows = tensors[i].size(0), columns = tensors[i].size(1);
      results.push_back(allocate({columns, rows}, options));
      casts.add(tensors[i], results[i], rows, columns);
    } else {
      results.push_back(allocate(tensors[i].sizes(), options));
      casts.add(tensors[i], results[i]);
    }
  }
  run(casts, type, dtype);
  return results;
}

Tensor cast_layout(const Tensor& weight, at::ScalarType dtype, at::MemoryFormat layout) {
  const bool last = layout == at::MemoryFormat::ChannelsLast;
  const auto is_float = [](at::ScalarType t) { return t == at::kHalf || t == at::kBFloat16 || t == at::kFloat; };
  if (!weight.is_contiguous(last ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast) ||
      weight.is_contiguous(layout) || !is_float(weight.scalar_type()) || !is_float(dtype)) {
    return weight.to(dtype, /*non_blocking=*/false, /*copy=*/false, layout);
  }
  const Tensor result = allocate(weight.sizes(), weight.options().dtype(dtype).memory_format(layout));
  const int64_t channels = weight.size(1), taps = weight.size(2) * weight.size(3);
  Casts casts{};
  casts.add(weight, result, last ? channels : taps, last ? taps : channels);
  run(casts, weight.scalar_type(), dtype);
  return result;
}

Tensor product_as(at::ScalarType type, const Tensor& a, const Tensor& b) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
  const bool half_sums = at::globalContext().allowFP16AccumulationCuBLAS();  // which have no float32 results
  if (type == at::kFloat && a.scalar_type() != at::kFloat && !half_sums) return at::mm(a, b, type);
#endif
  return at::mm(a, b).to(type);
}

std::vector<int64_t> with_last(const Tensor& x, int64_t size) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = size;
  return sizes;
}

}  // namespace mmvmamba

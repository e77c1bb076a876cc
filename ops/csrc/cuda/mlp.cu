// The MLP of a block, mmvmamba::mlp and its backward on CUDA: linear, GELU, linear.
//
// The products are cuBLAS's. What is ours: only the input and the hidden values before GELU are kept for backward,
// where one kernel makes GELU again (for the second weight's gradient), multiplies its derivative in, and sums the first
// bias's gradient on the way; weights are cast by one kernel instead of one each.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "column_sum.cuh"
#include "column_sum.h"
#include "dense.h"
#include "gelu.cuh"
#include "occupancy.cuh"
#include "vector.cuh"

namespace mmvmamba {
namespace {

using at::Tensor;

constexpr int kWidth = 8;  // values of a thread
constexpr int kThreads = 256;

template <typename T> __global__ void __launch_bounds__(kThreads) gelu_kernel(const T* x, T* y, int64_t vectors) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 2
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < vectors; i += stride) {
    float v[kWidth];
    load(x + i * kWidth, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = gelu<std::is_same<T, float>::value>(v[j]);
    store(y + i * kWidth, v);
  }
}

// y = GELU(hidden); grad, the gradient of y, becomes that of hidden; its sums over rows go to `partial`.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    gelu_backward_kernel(const T* hidden, T* grad, T* y, float* partial, int64_t rows, int columns, SumShape shape) {
  const SumPlace<kWidth> place(shape, columns);
  float sum[kWidth] = {};
  if (place.active) {
    for (int64_t row = place.first_row; row < rows; row += place.row_stride) {
      const int64_t at = row * columns + place.column;
      float h[kWidth], g[kWidth];
      load(hidden + at, h);
      load(grad + at, g);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float2 value = gelu_and_slope<std::is_same<T, float>::value>(h[j]);
        h[j] = value.x;
        g[j] *= value.y;
        sum[j] += g[j];
      }
      store(y + at, h);
      store(grad + at, g);
    }
  }
  place.leave(sum, partial, columns);
}

// Tensors cast by one launch.
constexpr int kMostCasts = 4, kCastChunk = 4 * kThreads;
struct Casts {
  const void* from[kMostCasts];
  void* to[kMostCasts];
  int64_t sizes[kMostCasts], first_block[kMostCasts + 1];
};

template <typename From, typename To> __global__ void __launch_bounds__(kThreads) cast_kernel(const Casts casts) {
  int which = 0;
  while (static_cast<int64_t>(blockIdx.x) >= casts.first_block[which + 1]) ++which;
  const From* from = static_cast<const From*>(casts.from[which]);
  To* to = static_cast<To*>(casts.to[which]);
  const int64_t begin = (blockIdx.x - casts.first_block[which]) * kCastChunk;
#pragma unroll
  for (int i = 0; i < kCastChunk / kThreads; ++i) {
    const int64_t at = begin + i * kThreads + threadIdx.x;
    if (at < casts.sizes[which]) to[at] = narrow<To>(widen(from[at]));
  }
}

// Call f(T()) for a dtype.
template <typename F> void with_type(at::ScalarType type, F f) {
  if (type == at::kHalf) return f(__half());
  if (type == at::kBFloat16) return f(__nv_bfloat16());
  TORCH_CHECK(type == at::kFloat, "mlp: x is ", type, ", expected float16, bfloat16 or float32");
  f(float());
}

// `tensors`, all of one dtype, in another; contiguous.
std::vector<Tensor> cast(std::vector<Tensor> tensors, at::ScalarType dtype) {
  for (Tensor& tensor : tensors) tensor = tensor.contiguous();
  if (tensors[0].scalar_type() == dtype) return tensors;
  Casts casts{};
  std::vector<Tensor> results;
  int64_t blocks = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    results.push_back(at::empty(tensors[i].sizes(), tensors[i].options().dtype(dtype)));
    casts.from[i] = tensors[i].data_ptr(), casts.to[i] = results[i].data_ptr();
    casts.sizes[i] = tensors[i].numel(), casts.first_block[i] = blocks;
    blocks += (tensors[i].numel() + kCastChunk - 1) / kCastChunk;
  }
  for (size_t i = tensors.size(); i <= kMostCasts; ++i) casts.first_block[i] = blocks;
  with_type(tensors[0].scalar_type(), [&](auto from) {
    with_type(dtype, [&](auto to) {
      cast_kernel<decltype(from), decltype(to)>
          <<<static_cast<unsigned>(blocks), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(casts);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return results;
}

void check(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2) {
  const int64_t channels = x.size(-1), hidden = weight1.size(0), out = weight2.size(0);
  TORCH_CHECK(channels % kWidth == 0 && hidden % kWidth == 0 && out % kWidth == 0, "mlp: widths ", channels, ", ",
              hidden, " and ", out, ", expected multiples of 8");
  TORCH_CHECK(weight1.size(1) == channels && bias1.numel() == hidden && weight2.size(1) == hidden &&
                  bias2.numel() == out,
              "mlp: the shapes of the weights do not fit x and one another");
  for (const Tensor* t : {&bias1, &weight2, &bias2}) {
    TORCH_CHECK(t->scalar_type() == weight1.scalar_type() && t->is_cuda(),
                "mlp: weights and biases must be CUDA tensors of one dtype");
  }
}

std::vector<int64_t> with_last(const Tensor& x, int64_t size) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = size;
  return sizes;
}

std::tuple<Tensor, Tensor> mlp_forward(const Tensor& x_in, const Tensor& weight1, const Tensor& bias1,
                                       const Tensor& weight2, const Tensor& bias2, bool save) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  check(x_in, weight1, bias1, weight2, bias2);
  const Tensor x = dense(x_in);
  const auto cast_weights = cast({weight1, bias1, weight2, bias2}, x.scalar_type());
  const int64_t rows = x.numel() / x.size(-1), width = weight1.size(0), out = weight2.size(0);
  Tensor hidden = at::addmm(cast_weights[1], x.view({rows, x.size(-1)}), cast_weights[0].t());
  Tensor activated = save ? at::empty_like(hidden) : hidden;
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t vectors = hidden.numel() / kWidth;
    const int64_t most = int64_t{16} * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
    const int64_t blocks = std::min((vectors + kThreads - 1) / kThreads, most);
    gelu_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        static_cast<const T*>(hidden.data_ptr()), static_cast<T*>(activated.data_ptr()), vectors);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const Tensor y = at::addmm(cast_weights[3], activated, cast_weights[2].t()).view(with_last(x, out));
  return {y, save ? hidden.view(with_last(x, width)) : at::empty({0}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& dy_in, const Tensor& x_in,
                                                                const Tensor& hidden, const Tensor& weight1,
                                                                const Tensor& weight2) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  const at::ScalarType type = x_in.scalar_type();
  const Tensor x = dense(x_in), dy = dense(dy_in.to(type));
  const int64_t channels = x.size(-1), rows = x.numel() / channels, width = weight1.size(0), out = weight2.size(0);
  TORCH_CHECK(hidden.numel() == rows * width, "mlp_backward: the forward was run without saving its hidden values");
  const auto cast_weights = cast({weight1, weight2}, type);
  const Tensor dy_rows = dy.view({rows, out});
  Tensor dhidden = at::mm(dy_rows, cast_weights[1]);
  Tensor activated = at::empty_like(dhidden), partial;
  with_type(type, [&](auto t) {
    using T = decltype(t);
    const SumShape shape = sum_shape<kWidth>(rows, width, resident_blocks(gelu_backward_kernel<T>, kSumThreads));
    partial = at::empty({shape.row_blocks, width}, x.options().dtype(at::kFloat));
    gelu_backward_kernel<T><<<shape.grid(), kSumThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        static_cast<const T*>(hidden.data_ptr()), static_cast<T*>(dhidden.data_ptr()),
        static_cast<T*>(activated.data_ptr()), partial.data_ptr<float>(), rows, static_cast<int>(width), shape);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const at::ScalarType weight_type = weight1.scalar_type();
  const Tensor dweight1 = at::mm(dhidden.t(), x.view({rows, channels})), dweight2 = at::mm(dy_rows.t(), activated);
  const auto dweights = cast({dweight1, dweight2}, weight_type);
  const auto dbiases = add_rows({{partial, 0, width}, partial_column_sum(dy)});
  return {at::mm(dhidden, cast_weights[0]).view(x.sizes()), dweights[0], dbiases[0].to(weight_type), dweights[1],
          dbiases[1].to(weight_type)};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("mlp", &mmvmamba::mlp_forward);
  m.impl("mlp_backward", &mmvmamba::mlp_backward);
}

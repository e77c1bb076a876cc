// The MLP of a block, mmvmamba::mlp and its backward on CUDA: linear, GELU, linear.
//
// The products are cuBLAS's; where there are few channels (96, 128 or 192, in 16 bits, with a multiple of 128 hidden
// ones, on a GPU whose blocks may have 143 KiB of shared memory), the one before GELU and most of backward are one
// kernel each (product.cuh, backward.cuh). What else is ours: only the input and the hidden values before GELU are kept
// for backward, where one kernel makes GELU again (for the second weight's gradient), multiplies its derivative in, and
// sums the first bias's gradient on the way; weights are cast by one kernel instead of one each.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/allocate.h"
#include "common/ceil_div.h"
#include "common/dense.h"
#include "common/launch.cuh"
#include "common/type_of.h"
#include "common/vector.cuh"
#include "fused/common/column_sum.cuh"
#include "fused/common/column_sum.h"
#include "fused/common/gelu.cuh"
#include "fused/common/mixed_precision.h"
#include "fused/mlp/backward.cuh"

namespace mmvmamba {
namespace {

using at::Tensor;

constexpr int kWidth = 8;  // values of a thread
constexpr int kThreads = 256;

// This kernel and the next go from the end to the start: the L2 cache holds what the product before wrote last, and
// then what the one after reads first.
template <typename T> struct GeluKernel {
  static constexpr int kThreads = 256, kBlocks = 0;

  static __device__ __forceinline__ void run(const T* x, T* y, int64_t vectors) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 2
    for (int64_t i = vectors - 1 - static_cast<int64_t>(blockIdx.x) * kThreads - threadIdx.x; i >= 0; i -= stride) {
      float v[kWidth];
      load(x + i * kWidth, v);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[j] = gelu<std::is_same<T, float>::value>(v[j]);
      store(y + i * kWidth, v);
    }
  }
};

// y = GELU(hidden); grad, the gradient of y, becomes that of hidden; its sums over rows go to `partial`.
template <typename T>
struct GeluBackwardKernel {
  static constexpr int kThreads = kSumThreads, kBlocks = 0;

  static __device__ __forceinline__ void run(const T* hidden, T* grad, T* y, float* partial, int64_t rows, int columns,
                                             SumShape shape) {
    const SumPlace<kWidth> place(shape, columns);
    float sum[kWidth] = {};
    if (place.active) {
      for (int64_t row = rows - 1 - place.first_row; row >= 0; row -= place.row_stride) {
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
};

template <typename F> void with_dtype(at::ScalarType type, F f) { with_type(type_of("mlp", type), f); }

void check(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2) {
  const int64_t channels = x.size(-1), hidden = weight1.size(0), out = weight2.size(0);
  TORCH_CHECK(channels % kWidth == 0 && hidden % kWidth == 0 && out % kWidth == 0, "mlp: widths ", channels, ", ",
              hidden, " and ", out, ", expected multiples of 8");
  TORCH_CHECK(
      weight1.size(1) == channels && bias1.numel() == hidden && weight2.size(1) == hidden && bias2.numel() == out,
      "mlp: the shapes of the weights do not fit x and one another");
  for (const Tensor* t : {&bias1, &weight2, &bias2}) {
    TORCH_CHECK(t->scalar_type() == weight1.scalar_type() && t->is_cuda(),
                "mlp: weights and biases must be CUDA tensors of one dtype");
  }
}

template <int Depth> constexpr int kBackwardColumns = Depth == 96 ? 128 : 64;  // as many as there are registers for
template <int Depth> using BackwardMemory = product::BackwardMemory<Depth, kBackwardColumns<Depth>>;

// Call f(T(), depth) for the types and depths, as constants, of the kernels for few channels.
template <typename F> void with_product(at::ScalarType type, int64_t depth, F f) {
  with_dtype(type, [&](auto t) {
    if constexpr (sizeof(t) == 2) {
      if (depth == 96) f(t, std::integral_constant<int, 96>());
      if (depth == 128) f(t, std::integral_constant<int, 128>());
      if (depth == 192) f(t, std::integral_constant<int, 192>());
    }
  });
}

// Whether the kernels for few channels take an MLP of `depth` of them and `columns` hidden ones, on this GPU.
bool few_channels(at::ScalarType type, int64_t depth, int64_t columns) {
  bool few = false;
  if (columns % product::kColumns == 0) {
    with_product(type, depth, [&](auto, auto channels) {
      constexpr int depth = decltype(channels)::value;
      constexpr size_t bytes = std::max(product::kSharedBytes<depth>, BackwardMemory<depth>::kBytes);
      few = bytes <= at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin;
    });
  }
  return few;
}

// One round of blocks that walk over the tiles of `rows`, beside one another for `across` parts of the columns.
template <typename Kernel> dim3 walking_grid(int bytes, int64_t across, int64_t rows) {
  const int64_t most = int64_t{resident_blocks<Kernel>(product::kThreads, bytes)} *
                       at::cuda::getCurrentDeviceProperties()->multiProcessorCount / across;
  const int64_t tiles = ceil_div(rows, product::kRows);
  return dim3(static_cast<unsigned>(across), static_cast<unsigned>(std::max<int64_t>(1, std::min(tiles, most))));
}

// GELU(x W1^T + b1), (rows, hidden), and with `save` the values before GELU, else no tensor.
std::tuple<Tensor, Tensor> hidden_layer(const Tensor& x, const Tensor& weight, const Tensor& bias, bool save) {
  if (few_channels(x.scalar_type(), x.size(1), weight.size(0))) {
    Tensor activated = allocate({x.size(0), weight.size(0)}, x.options()), hidden;
    if (save) hidden = allocate_like(activated);
    product::Args args{};
    args.a = x.data_ptr(), args.b = weight.data_ptr(), args.bias = bias.data_ptr();
    args.hidden = save ? hidden.data_ptr() : nullptr, args.activated = activated.data_ptr();
    args.rows = x.size(0), args.columns = static_cast<int>(weight.size(0));
    with_product(x.scalar_type(), x.size(1), [&](auto type, auto channels) {
      constexpr int depth = decltype(channels)::value, bytes = product::kSharedBytes<depth>;
      using Kernel = product::HiddenKernel<decltype(type), depth>;
      const dim3 grid = walking_grid<Kernel>(bytes, args.columns / product::kColumns, args.rows);
      launch<Kernel>(grid, product::kThreads, bytes, at::cuda::getCurrentCUDAStream(), args);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return {activated, hidden};
  }
  Tensor hidden = at::addmm(bias, x, weight.t());
  Tensor activated = save ? allocate_like(hidden) : hidden;
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t vectors = hidden.numel() / kWidth;
    const int64_t most = int64_t{16} * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
    const int64_t blocks = std::min(ceil_div(vectors, kThreads), most);
    launch<GeluKernel<T>>(static_cast<unsigned>(blocks), kThreads, 0, at::cuda::getCurrentCUDAStream(),
                          static_cast<const T*>(hidden.data_ptr()), static_cast<T*>(activated.data_ptr()), vectors);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {activated, save ? hidden : Tensor()};
}

// What backward makes of dy (rows, out) beside the gradient of x.
struct HiddenGrads {
  Tensor dhidden;             // (rows, hidden)
  Tensor bias;                // partial sums of the first bias's gradient
  Tensor dweight1, dweight2;  // in the dtype of the weights; or partial sums of them, if `partial`
  bool partial;
};

// For few channels, with `weight2` transposed, (hidden, out).
HiddenGrads few_channels_backward(const Tensor& dy, const Tensor& x, const Tensor& hidden, const Tensor& weight2) {
  const int64_t rows = dy.size(0), width = hidden.size(-1), channels = x.size(1);
  HiddenGrads grads;
  grads.partial = true, grads.dhidden = allocate({rows, width}, dy.options());
  with_product(dy.scalar_type(), channels, [&](auto type, auto constant) {
    constexpr int depth = decltype(constant)::value, columns = kBackwardColumns<depth>;
    constexpr int bytes = BackwardMemory<depth>::kBytes;
    using Kernel = product::HiddenBackwardKernel<decltype(type), depth, columns>;
    const dim3 grid = walking_grid<Kernel>(bytes, width / columns, rows);
    const auto options = dy.options().dtype(at::kFloat);
    grads.bias = allocate({grid.y, width}, options);
    grads.dweight1 = allocate({grid.y, width * channels}, options);
    grads.dweight2 = allocate({grid.y, width * channels}, options);
    product::BackwardArgs args{};
    args.dy = dy.data_ptr(), args.x = x.data_ptr(), args.weight2 = weight2.data_ptr(), args.hidden = hidden.data_ptr();
    args.grad = grads.dhidden.data_ptr(), args.bias = grads.bias.template data_ptr<float>();
    args.dw1 = grads.dweight1.template data_ptr<float>(), args.dw2 = grads.dweight2.template data_ptr<float>();
    args.rows = rows, args.columns = static_cast<int>(width);
    launch<Kernel>(grid, product::kThreads, bytes, at::cuda::getCurrentCUDAStream(), args);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grads;
}

HiddenGrads hidden_backward(const Tensor& dy, const Tensor& x, const Tensor& hidden, const Tensor& weight2,
                            at::ScalarType weight_type) {
  const int64_t rows = dy.size(0), width = hidden.size(-1);
  HiddenGrads grads;
  grads.partial = false, grads.dhidden = at::mm(dy, weight2);
  Tensor activated = allocate_like(grads.dhidden);
  with_dtype(dy.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const SumShape shape = sum_shape<kWidth>(rows, width, resident_blocks<GeluBackwardKernel<T>>(kSumThreads));
    grads.bias = allocate({shape.row_blocks, width}, dy.options().dtype(at::kFloat));
    launch<GeluBackwardKernel<T>>(shape.grid(), kSumThreads, 0, at::cuda::getCurrentCUDAStream(),
                                  static_cast<const T*>(hidden.data_ptr()), static_cast<T*>(grads.dhidden.data_ptr()),
                                  static_cast<T*>(activated.data_ptr()), grads.bias.template data_ptr<float>(), rows,
                                  static_cast<int>(width), shape);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  grads.dweight1 = product_as(weight_type, grads.dhidden.t(), x);
  grads.dweight2 = product_as(weight_type, dy.t(), activated);
  return grads;
}

std::tuple<Tensor, Tensor> mlp_forward(const Tensor& x_in, const Tensor& weight1, const Tensor& bias1,
                                       const Tensor& weight2, const Tensor& bias2, bool save) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  check(x_in, weight1, bias1, weight2, bias2);
  const Tensor x = dense(x_in);
  const auto cast_weights = cast({weight1, bias1, weight2, bias2}, x.scalar_type());
  const int64_t rows = x.numel() / x.size(-1), width = weight1.size(0), out = weight2.size(0);
  const auto [activated, hidden] = hidden_layer(x.view({rows, x.size(-1)}), cast_weights[0], cast_weights[1], save);
  const Tensor y = at::addmm(cast_weights[3], activated, cast_weights[2].t()).view(with_last(x, out));
  return {y, save ? hidden.view(with_last(x, width)) : allocate({0}, x.options())};
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
  const bool few = channels == out && few_channels(type, channels, width);
  const auto cast_weights = cast({weight1, weight2}, type, few ? 1 : kNoneTransposed);
  const Tensor dy_rows = dy.view({rows, out}), x_rows = x.view({rows, channels}), hidden_rows = hidden.contiguous();
  const at::ScalarType weight_type = weight1.scalar_type();
  HiddenGrads grads = few ? few_channels_backward(dy_rows, x_rows, hidden_rows, cast_weights[1])
                          : hidden_backward(dy_rows, x_rows, hidden_rows, cast_weights[1], weight_type);
  std::vector<Columns> sums = {{grads.bias, 0, width}, partial_column_sum(dy)};
  if (grads.partial) {
    sums.push_back({grads.dweight1, 0, width * channels});
    sums.push_back({grads.dweight2, 0, width * out});
  }
  const auto added = add_rows(sums);
  if (grads.partial) grads.dweight1 = added[2].view(weight1.sizes()), grads.dweight2 = added[3].view(weight2.sizes());
  return {at::mm(grads.dhidden, cast_weights[0]).view(x.sizes()), grads.dweight1.to(weight_type),
          added[0].to(weight_type), grads.dweight2.to(weight_type), added[1].to(weight_type)};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("mlp", &mmvmamba::mlp_forward);
  m.impl("mlp_backward", &mmvmamba::mlp_backward);
}

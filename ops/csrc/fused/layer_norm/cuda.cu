// Layer normalisation over a short last dimension, alone and of a residual sum: mmvmamba::layer_norm, add_layer_norm
// and their backwards on CUDA.
//
// torch's kernel gives a whole block to each row, which starves for rows of 48 to 1024 channels, and under autocast it
// writes float. Here `Lanes` lanes own a row, values stay in registers, and the output has the dtype that its reader
// wants. Forward moves x in and y out; backward x and dy in, dx out. add_layer_norm has the residual addition on the
// way: the branch in and the sum out as well, and in backward the sum's gradient in and the branch's out; layer_norm can
// have the bias of the convolution before it and the GELU after it. The sums over rows for weight and bias are kept in
// registers over all rows of a thread, added over the block in a fixed order, and leave as one partial sum a block.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "common/allocate.h"
#include "fused/common/column_sum.h"
#include "common/dense.h"
#include "common/dtypes.h"
#include "fused/layer_norm/kernels.cuh"
#include "common/occupancy.cuh"

namespace mmvmamba {
namespace {

using at::Tensor;
using norm::AfterConv;
using norm::Branch;
using norm::BranchGrad;
using norm::Factors;
using norm::kThreads;
using norm::Plain;

int64_t blocks_for(int64_t rows, int lanes, int blocks_a_processor) {
  const int processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  const int64_t whole = (rows * lanes + kThreads - 1) / kThreads;
  return std::max<int64_t>(1, std::min<int64_t>(whole, processors * blocks_a_processor));
}

// Call f(lanes, chunks) with compile-time numbers that hold `channels`, exactly for the usual widths. In a lambda inside
// f use their values: CUDA 11.8's nvcc crashes at the numbers themselves.
template <typename F> void with_shape(int64_t channels, F f) {
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

// Call f(In(), Out()) for x and an output of the same type, or either of them float.
template <typename F> void with_types(at::ScalarType in, at::ScalarType out, F f) {
  if (in == at::kFloat && out == at::kFloat) return f(float(), float());
  if (in == at::kFloat && out == at::kHalf) return f(float(), __half());
  if (in == at::kFloat && out == at::kBFloat16) return f(float(), __nv_bfloat16());
  if (in == at::kHalf && out == at::kFloat) return f(__half(), float());
  if (in == at::kBFloat16 && out == at::kFloat) return f(__nv_bfloat16(), float());
  if (in == at::kHalf && out == at::kHalf) return f(__half(), __half());
  if (in == at::kBFloat16 && out == at::kBFloat16) return f(__nv_bfloat16(), __nv_bfloat16());
  TORCH_CHECK(false, "layer_norm: x is ", in, " and the output ", out, ", expected one type, or one of them float32");
}

// A branch has the type of the output, and a sum holds it without rounding.
template <typename In, typename Out>
constexpr bool kCanAdd = std::is_same<In, Out>::value || std::is_same<In, float>::value;

// The map after a convolution has the convolution's type; the norm keeps it or gives float.
template <typename In, typename Out>
constexpr bool kCanFollow = std::is_same<In, Out>::value || std::is_same<Out, float>::value;

// Weight, bias and perhaps a convolution's bias.
struct Parameters {
  Tensor weight, bias, shift;
  bool gelu;

  Parameters(const Tensor& x, at::ScalarType out_dtype, const Tensor& weight_in, const Tensor& bias_in,
             const std::optional<Tensor>& shift_in = std::nullopt, bool with_gelu = false)
      : gelu(with_gelu) {
    const int64_t channels = x.size(-1);
    TORCH_CHECK((!shift_in && !with_gelu) || out_dtype == x.scalar_type() || out_dtype == at::kFloat,
                "layer_norm: with shift or gelu the output is ", out_dtype, " for ", x.scalar_type(),
                " x, expected the same or float32");
    TORCH_CHECK(channels % 4 == 0 && channels <= 1024, "layer_norm: ", channels,
                " channels, expected a multiple of 4 up to 1024");
    for (const Tensor* t : {&weight_in, &bias_in, shift_in ? &*shift_in : &bias_in}) {
      TORCH_CHECK(t->scalar_type() == at::kFloat && t->numel() == channels && t->is_cuda(),
                  "layer_norm: weight, bias and shift must be float32 CUDA tensors of ", channels, " elements");
    }
    weight = dense(weight_in), bias = dense(bias_in);
    if (shift_in) shift = dense(*shift_in);
  }
  bool after_conv() const { return shift.defined() || gelu; }
  AfterConv beside() const { return {shift.defined() ? shift.data_ptr<float>() : nullptr, gelu}; }
};

Factors factors_of(const std::optional<Tensor>& factors, int64_t rows) {
  if (!factors.has_value()) return {nullptr, 1};
  const int64_t samples = factors->numel();
  TORCH_CHECK(factors->scalar_type() == at::kFloat && factors->is_contiguous() && factors->is_cuda() && samples > 0 &&
                  rows % samples == 0,
              "add_layer_norm: factors must be a contiguous float32 CUDA tensor, one factor for each sample");
  return {factors->data_ptr<float>(), static_cast<unsigned>(rows / samples)};
}

// A residual branch and its factors.
struct Addend {
  const Tensor& branch;
  const std::optional<Tensor>& factors;
};

// y and statistics; with a branch also the sum, which is normalised.
struct Result {
  Tensor sum, y, statistics;
};

Result forward(const Tensor& x_in, const Addend* addend, const Parameters& parameters, double eps,
               at::ScalarType out_dtype, bool save) {
  const Tensor x = dense(x_in);
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  Result result;
  result.y = allocate(x.sizes(), x.options().dtype(out_dtype));
  result.statistics = allocate({save ? rows : 0, 2}, parameters.weight.options());
  Tensor branch;
  Factors factors{};
  if (addend != nullptr) {
    TORCH_CHECK(addend->branch.sizes() == x.sizes() && addend->branch.scalar_type() == out_dtype &&
                    (out_dtype == x.scalar_type() || x.scalar_type() == at::kFloat) && rows < (1ll << 32),
                "add_layer_norm: branch must have the shape of x and the dtype of the output");
    branch = dense(addend->branch), factors = factors_of(addend->factors, rows);
    result.sum = allocate_like(x);
  }
  with_types(x.scalar_type(), out_dtype, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    with_shape(channels, [&](auto lanes, auto chunks) {
      constexpr int Lanes = decltype(lanes)::value, Chunks = decltype(chunks)::value;
      const auto run = [&](auto beside) {
        const auto kernel = norm::forward_kernel<In, Out, Lanes, Chunks, decltype(beside)>;
        const int64_t blocks = blocks_for(rows, Lanes, resident_blocks(kernel, kThreads));
        launch(
            kernel, blocks, kThreads, 0, at::cuda::getCurrentCUDAStream(),
            static_cast<const In*>(x.data_ptr()), beside, parameters.weight.template data_ptr<float>(),
            parameters.bias.template data_ptr<float>(), static_cast<Out*>(result.y.data_ptr()),
            save ? reinterpret_cast<float2*>(result.statistics.data_ptr()) : nullptr, rows, static_cast<int>(channels),
            static_cast<float>(eps));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      };
      if constexpr (kCanAdd<In, Out>) {
        if (addend != nullptr) {
          return run(Branch<In, Out>{static_cast<const Out*>(branch.data_ptr()),
                                        static_cast<In*>(result.sum.data_ptr()), factors});
        }
      }
      if constexpr (kCanFollow<In, Out>) {
        if (parameters.after_conv()) return run(parameters.beside());
      }
      run(Plain{});
    });
  });
  return result;
}

struct Grads {
  Tensor dx, dbranch, dshift, dweight, dbias;
};

// `dsum_in` is the gradient of the sum, null without a branch.
Grads backward(const Tensor* dsum_in, const Tensor& dy_in, const Tensor& x_in, const std::optional<Tensor>& factors_in,
               const Parameters& parameters, const Tensor& statistics) {
  const Tensor x = dense(x_in), dy = dense(dy_in);
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  TORCH_CHECK(statistics.size(0) == rows, "layer_norm_backward: the forward was run without saving its statistics");
  Grads grads;
  grads.dx = allocate_like(x);
  Tensor dsum, partial;
  Factors factors{};
  if (dsum_in != nullptr) {
    dsum = dense(dsum_in->to(x.scalar_type())), factors = factors_of(factors_in, rows);
    grads.dbranch = allocate_like(dy);
  }
  with_types(x.scalar_type(), dy.scalar_type(), [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    with_shape(channels, [&](auto lanes, auto chunks) {
      constexpr int Lanes = decltype(lanes)::value, Chunks = decltype(chunks)::value;
      const auto run = [&](auto beside) {
        const auto kernel = norm::backward_kernel<In, Out, Lanes, Chunks, decltype(beside)>;
        constexpr int sums = norm::kSums<decltype(beside)>;
        const size_t shared = sums * channels * sizeof(float);
        const int64_t blocks = blocks_for(rows, Lanes, resident_blocks(kernel, kThreads, shared));
        partial = allocate({blocks, sums * channels}, parameters.weight.options());
        launch(
            kernel, blocks, kThreads, shared, at::cuda::getCurrentCUDAStream(),
            static_cast<const Out*>(dy.data_ptr()), static_cast<const In*>(x.data_ptr()), beside,
            parameters.weight.template data_ptr<float>(), parameters.bias.template data_ptr<float>(),
            reinterpret_cast<const float2*>(statistics.data_ptr()), static_cast<In*>(grads.dx.data_ptr()),
            partial.data_ptr<float>(), rows, static_cast<int>(channels));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      };
      if constexpr (kCanAdd<In, Out>) {
        if (dsum.defined()) {
          return run(BranchGrad<In, Out>{static_cast<const In*>(dsum.data_ptr()),
                                            static_cast<Out*>(grads.dbranch.data_ptr()), factors});
        }
      }
      if constexpr (kCanFollow<In, Out>) {
        if (parameters.after_conv()) return run(parameters.beside());
      }
      run(Plain{});
    });
  });
  const bool shifted = parameters.shift.defined();
  std::vector<Columns> sums = {{partial, 0, channels}, {partial, channels, channels}};
  if (shifted) sums.push_back({partial, 2 * channels, channels});
  const std::vector<Tensor> rows_sums = add_rows(sums);
  grads.dweight = rows_sums[0], grads.dbias = rows_sums[1];
  grads.dshift = shifted ? rows_sums[2] : allocate({0}, parameters.weight.options());
  return grads;
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& shift, const Tensor& weight,
                                      const Tensor& bias, double eps, int64_t output_type, bool gelu, bool save) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType out_dtype = output_dtype("layer_norm", output_type);
  const Result result = forward(x, nullptr, Parameters(x, out_dtype, weight, bias, shift, gelu), eps, out_dtype, save);
  return {result.y, result.statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x,
                                                               const std::optional<Tensor>& shift, const Tensor& weight,
                                                               const Tensor& bias, const Tensor& statistics,
                                                               bool gelu) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Parameters parameters(x, dy.scalar_type(), weight, bias, shift, gelu);
  const Grads grads = backward(nullptr, dy, x, std::nullopt, parameters, statistics);
  return {grads.dx, grads.dshift, grads.dweight, grads.dbias};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& branch,
                                                  const std::optional<Tensor>& factors, const Tensor& weight,
                                                  const Tensor& bias, double eps, bool save) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType out_dtype = branch.scalar_type();
  const Addend addend{branch, factors};
  const Result result = forward(x, &addend, Parameters(x, out_dtype, weight, bias), eps, out_dtype, save);
  return {result.sum, result.y, result.statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(const Tensor& dsum, const Tensor& dy,
                                                                   const Tensor& sum,
                                                                   const std::optional<Tensor>& factors,
                                                                   const Tensor& weight, const Tensor& statistics) {
  const c10::cuda::CUDAGuard guard(sum.device());
  const Parameters parameters(sum, dy.scalar_type(), weight, weight);  // no bias is read without GELU
  const Grads grads = backward(&dsum, dy, sum, factors, parameters, statistics);
  return {grads.dx, grads.dbranch, grads.dweight, grads.dbias};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("layer_norm", &mmvmamba::layer_norm);
  m.impl("layer_norm_backward", &mmvmamba::layer_norm_backward);
  m.impl("add_layer_norm", &mmvmamba::add_layer_norm);
  m.impl("add_layer_norm_backward", &mmvmamba::add_layer_norm_backward);
}

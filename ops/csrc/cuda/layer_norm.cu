// Layer normalisation over a short last dimension, alone and of a residual sum: mmvmamba::layer_norm, add_layer_norm
// and their backwards on CUDA.
//
// torch's kernel gives a whole block to each row, which starves for rows of 48 to 1024 channels, and under autocast it
// writes float. Here `Lanes` lanes own a row, values stay in registers, and the output has the dtype that its reader
// wants. Forward moves x in and y out; backward x and dy in, dx out. add_layer_norm has the residual addition on the
// way: the branch in and the sum out as well, and in backward the sum's gradient in and the branch's out. The sums over
// rows for weight and bias are kept in registers over all rows of a thread, added over the block in a fixed order, and
// leave as one partial sum a block.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "column_sum.h"
#include "dense.h"
#include "layer_norm.cuh"
#include "occupancy.cuh"

namespace mmvmamba {
namespace {

using at::Tensor;
using norm::Branch;
using norm::BranchGrad;
using norm::Factors;
using norm::kThreads;

int64_t blocks_for(int64_t rows, int lanes, int blocks_a_processor) {
  const int processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  const int64_t whole = (rows * lanes + kThreads - 1) / kThreads;
  return std::max<int64_t>(1, std::min<int64_t>(whole, processors * blocks_a_processor));
}

// Call f(lanes, chunks) with compile-time numbers that hold `channels`, exactly for the usual widths.
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

void check(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t channels = x.size(-1);
  TORCH_CHECK(channels % 4 == 0 && channels <= 1024, "layer_norm: ", channels,
              " channels, expected a multiple of 4 up to 1024");
  for (const Tensor* t : {&weight, &bias}) {
    TORCH_CHECK(t->scalar_type() == at::kFloat && t->numel() == channels && t->is_cuda(),
                "layer_norm: weight and bias must be float32 CUDA tensors of ", channels, " elements");
  }
}

Factors factors_of(const std::optional<Tensor>& factors, int64_t rows) {
  if (!factors.has_value()) return {nullptr, 1};
  const int64_t samples = factors->numel();
  TORCH_CHECK(factors->scalar_type() == at::kFloat && factors->is_contiguous() && factors->is_cuda() && samples > 0 &&
                  rows % samples == 0,
              "add_layer_norm: factors must be a contiguous float32 CUDA tensor, one factor for each sample");
  return {factors->data_ptr<float>(), static_cast<unsigned>(rows / samples)};
}

// y and statistics; with a branch also the sum, which is normalised.
struct Result {
  Tensor sum, y, statistics;
};

Result forward(const Tensor& x_in, const Tensor* branch_in, const std::optional<Tensor>& factors,
               const Tensor& weight_in, const Tensor& bias_in, double eps, at::ScalarType out_dtype, bool save) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  check(x_in, weight_in, bias_in);
  const Tensor x = dense(x_in), weight = dense(weight_in), bias = dense(bias_in);
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  Result result;
  result.y = at::empty_like(x, x.options().dtype(out_dtype));
  result.statistics = at::empty({save ? rows : 0, 2}, weight.options());
  Tensor branch;
  if (branch_in != nullptr) {
    TORCH_CHECK(branch_in->sizes() == x.sizes() && branch_in->scalar_type() == out_dtype &&
                    (out_dtype == x.scalar_type() || x.scalar_type() == at::kFloat) && rows < (1ll << 32),
                "add_layer_norm: branch must have the shape of x and the dtype of the output");
    branch = dense(*branch_in);
    result.sum = at::empty_like(x);
  }
  with_types(x.scalar_type(), out_dtype, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    with_shape(channels, [&](auto lanes, auto chunks) {
      const bool add = branch.defined();
      const Branch<In, Out> residual = {add ? static_cast<const Out*>(branch.data_ptr()) : nullptr,
                                        add ? static_cast<In*>(result.sum.data_ptr()) : nullptr,
                                        factors_of(factors, rows)};
      const auto kernel = add ? norm::forward_kernel<In, Out, lanes, chunks, kCanAdd<In, Out>>
                              : norm::forward_kernel<In, Out, lanes, chunks, false>;
      const int64_t blocks = blocks_for(rows, lanes, resident_blocks(kernel, kThreads));
      kernel<<<blocks, kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
          static_cast<const In*>(x.data_ptr()), residual, weight.data_ptr<float>(), bias.data_ptr<float>(),
          static_cast<Out*>(result.y.data_ptr()),
          save ? reinterpret_cast<float2*>(result.statistics.data_ptr()) : nullptr, rows, static_cast<int>(channels),
          static_cast<float>(eps));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return result;
}

struct Grads {
  Tensor dx, dbranch, dweight, dbias;
};

Grads backward(const Tensor* dsum_in, const Tensor& dy_in, const Tensor& x_in, const std::optional<Tensor>& factors,
               const Tensor& weight_in, const Tensor& statistics) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  check(x_in, weight_in, weight_in);
  const Tensor x = dense(x_in), dy = dense(dy_in), weight = dense(weight_in);
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  TORCH_CHECK(statistics.size(0) == rows, "layer_norm_backward: the forward was run without saving its statistics");
  Grads grads;
  grads.dx = at::empty_like(x);
  Tensor dsum, partial;
  if (dsum_in != nullptr) {
    dsum = dense(dsum_in->to(x.scalar_type()));
    grads.dbranch = at::empty_like(dy);
  }
  with_types(x.scalar_type(), dy.scalar_type(), [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    with_shape(channels, [&](auto lanes, auto chunks) {
      const bool add = dsum.defined();
      const BranchGrad<In, Out> residual = {add ? static_cast<const In*>(dsum.data_ptr()) : nullptr,
                                            add ? static_cast<Out*>(grads.dbranch.data_ptr()) : nullptr,
                                            factors_of(factors, rows)};
      const auto kernel = add ? norm::backward_kernel<In, Out, lanes, chunks, kCanAdd<In, Out>>
                              : norm::backward_kernel<In, Out, lanes, chunks, false>;
      const size_t shared = 2 * channels * sizeof(float);
      const int64_t blocks = blocks_for(rows, lanes, resident_blocks(kernel, kThreads, shared));
      partial = at::empty({blocks, 2, channels}, weight.options());
      kernel<<<blocks, kThreads, shared, at::cuda::getCurrentCUDAStream()>>>(
          static_cast<const Out*>(dy.data_ptr()), static_cast<const In*>(x.data_ptr()), residual,
          weight.data_ptr<float>(), reinterpret_cast<const float2*>(statistics.data_ptr()),
          static_cast<In*>(grads.dx.data_ptr()), partial.data_ptr<float>(), rows, static_cast<int>(channels));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  const std::vector<Tensor> sums = add_rows(partial, 2);
  grads.dweight = sums[0], grads.dbias = sums[1];
  return grads;
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                      at::ScalarType out_dtype, bool save) {
  const Result result = forward(x, nullptr, std::nullopt, weight, bias, eps, out_dtype, save);
  return {result.y, result.statistics};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                       const Tensor& statistics) {
  const Grads grads = backward(nullptr, dy, x, std::nullopt, weight, statistics);
  return {grads.dx, grads.dweight, grads.dbias};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& branch,
                                                  const std::optional<Tensor>& factors, const Tensor& weight,
                                                  const Tensor& bias, double eps, at::ScalarType out_dtype, bool save) {
  const Result result = forward(x, &branch, factors, weight, bias, eps, out_dtype, save);
  return {result.sum, result.y, result.statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(const Tensor& dsum, const Tensor& dy,
                                                                   const Tensor& sum,
                                                                   const std::optional<Tensor>& factors,
                                                                   const Tensor& weight, const Tensor& statistics) {
  const Grads grads = backward(&dsum, dy, sum, factors, weight, statistics);
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

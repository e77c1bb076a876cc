// Layer normalisation over a short last dimension, alone and of a residual sum: mmvmamba::layer_norm, add_layer_norm
// and their backwards on CUDA.
//
// torch's kernel gives a whole block to each row, which starves for rows of 48 to 1024 channels, and under autocast it
// writes float. Here `Lanes` lanes own a row, values stay in registers, and the output has the dtype that its reader
// wants. Forward moves x in and y out; backward x and dy in, dx out. add_layer_norm has the residual addition on the
// way: the branch in and the sum out as well, and in backward the sum's gradient in and the branch's out; layer_norm
// can have the bias of the convolution before it and the GELU after it. The sums over rows for weight and bias are kept
// in registers over all rows of a thread, added over the block in a fixed order, and leave as one partial sum a block.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>

#include "common/allocate.h"
#include "common/dense.h"
#include "common/dtypes.h"
#include "common/element_type.h"
#include "fused/common/column_sum.h"
#include "fused/layer_norm/kernels.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using norm::Factors;

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
  const float* shift_data() const { return shift.defined() ? shift.data_ptr<float>() : nullptr; }
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
  norm::Forward args{};
  args.x = x.data_ptr(), args.y = result.y.data_ptr(), args.rows = rows, args.channels = static_cast<int>(channels);
  args.weight = parameters.weight.data_ptr<float>(), args.bias = parameters.bias.data_ptr<float>();
  args.statistics = save ? reinterpret_cast<float2*>(result.statistics.data_ptr()) : nullptr;
  args.processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount, args.eps = static_cast<float>(eps);
  if (addend != nullptr) args.branch = branch.data_ptr(), args.sum = result.sum.data_ptr(), args.factors = factors;
  args.shift = parameters.shift_data(), args.gelu = parameters.gelu;
  with_types(x.scalar_type(), out_dtype, [&](auto in, auto out) {
    norm::Kernels<decltype(in), decltype(out)>::forward(args, at::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
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
  norm::Backward args{};
  args.dy = dy.data_ptr(), args.x = x.data_ptr(), args.dx = grads.dx.data_ptr();
  args.weight = parameters.weight.data_ptr<float>(), args.bias = parameters.bias.data_ptr<float>();
  args.statistics = reinterpret_cast<const float2*>(statistics.data_ptr());
  args.rows = rows, args.channels = static_cast<int>(channels);
  args.processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  if (dsum.defined()) args.dsum = dsum.data_ptr(), args.dbranch = grads.dbranch.data_ptr(), args.factors = factors;
  args.shift = parameters.shift_data(), args.gelu = parameters.gelu;
  const auto allocate_partial = [&](int64_t blocks, int64_t columns) {
    partial = allocate({blocks, columns}, parameters.weight.options());
    return partial.data_ptr<float>();
  };
  with_types(x.scalar_type(), dy.scalar_type(), [&](auto in, auto out) {
    norm::Kernels<decltype(in), decltype(out)>::backward(args, allocate_partial, at::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
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

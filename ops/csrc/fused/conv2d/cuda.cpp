// mmvmamba::conv2d_channel_last on CUDA, cudnn's convolution of channel-last maps as an op of its own, whose layout no
// compiler changes; and the autograd of this op and of mmvmamba::depthwise_conv_silu. The schemas are those of
// ops/convolution/library.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/autograd.h"
#include "common/allocate.h"
#include "fused/common/column_sum.h"
#include "common/dense.h"
#include "fused/common/mixed_precision.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- conv2d_channel_last --------------------------------------------------------------------------------------------
void check(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(3),
              "conv2d_channel_last: x must have the shape (B, H, W, C_in) and weight (C_out, C_in, k, k), got ",
              x.sizes(), " and ", weight.sizes());
}

Tensor channel_first(const Tensor& x) { return x.permute({0, 3, 1, 2}); }

// The weight in another dtype and in cudnn's layout of channel-last maps.
Tensor weight_like(const Tensor& weight, const Tensor& x) {
  return cast_layout(weight, x.scalar_type(), at::MemoryFormat::ChannelsLast);
}

Tensor conv2d_channel_last(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                           int64_t padding) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  check(x_in, weight);
  const Tensor x = dense(x_in);
  const Tensor out = at::convolution(channel_first(x), weight_like(weight, x), std::nullopt, {stride, stride},
                                     {padding, padding}, {1, 1}, /*transposed=*/false, {0, 0}, /*groups=*/1);
  const Tensor y = dense(out.permute({0, 2, 3, 1}));  // no copy: cudnn keeps the layout
  if (!bias) return y;
  if (y.size(3) % 4) return y.add_(bias->to(y.scalar_type()));
  add_bias_(y, dense(bias->to(at::kFloat)));  // torch's is four times as slow on a channel-last map
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_channel_last_backward(const Tensor& dy_in, const Tensor& x_in,
                                                                const Tensor& weight, int64_t stride, int64_t padding,
                                                                bool x_grad, bool bias_grad) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  check(x_in, weight);
  const Tensor x = dense(x_in), dy = dense(dy_in);
  const auto [dx, dw, unused] = at::convolution_backward(
      channel_first(dy), channel_first(x), weight_like(weight, x), at::OptionalIntArrayRef(), {stride, stride},
      {padding, padding}, {1, 1}, /*transposed=*/false, {0, 0}, /*groups=*/1, std::array<bool, 3>{x_grad, true, false});
  const auto float_options = x.options().dtype(at::kFloat);
  Tensor db = allocate({0}, float_options);
  if (bias_grad) db = dy.size(3) % 4 == 0 ? column_sum(dy) : dy.sum({0, 1, 2}, /*keepdim=*/false, at::kFloat);
  return {x_grad ? dx.permute({0, 2, 3, 1}).contiguous() : allocate({0}, x.options()),
          cast_layout(dw, weight.scalar_type(), at::MemoryFormat::Contiguous).contiguous(), db};
}

// ---- autograd -------------------------------------------------------------------------------------------------------
using ThreeGrads = std::tuple<Tensor, Tensor, Tensor>;
using DepthwiseForward = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&);
using DepthwiseBackward = ThreeGrads(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&);

const BelowAutograd<DepthwiseForward>& run_depthwise() {
  static const BelowAutograd<DepthwiseForward> op("mmvmamba::depthwise_conv_silu");
  return op;
}

struct DepthwiseConvSilu : torch::autograd::Function<DepthwiseConvSilu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias) {
    ctx->save_for_backward({x, weight, bias.value_or(Tensor())});
    ctx->set_materialize_grads(false);
    return run_depthwise()(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    static const auto op = find_op<DepthwiseBackward>("mmvmamba::depthwise_conv_silu_backward");
    const variable_list saved = ctx->get_saved_variables();
    const FirstDerivative guard;
    const auto bias = saved[2].defined() ? std::optional<Tensor>(saved[2]) : std::nullopt;
    Tensor db;
    std::tie(result[0], result[1], db) = op.call(grads[0], saved[0], saved[1], bias);
    if (bias) result[2] = db;
    return result;
  }
};

Tensor depthwise_conv_silu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (skips_autograd(x, weight, bias)) return run_depthwise()(x, weight, bias);
  return DepthwiseConvSilu::apply(x, weight, bias);
}

using ConvForward = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t, int64_t);
using ConvBackward = ThreeGrads(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool, bool);

const BelowAutograd<ConvForward>& run_conv() {
  static const BelowAutograd<ConvForward> op("mmvmamba::conv2d_channel_last");
  return op;
}

struct ConvChannelLast : torch::autograd::Function<ConvChannelLast> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        int64_t stride, int64_t padding) {
    ctx->save_for_backward({x, weight});
    ctx->set_materialize_grads(false);
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["x_grad"] = x.requires_grad();
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["bias_dtype"] = bias ? bias->scalar_type() : at::kFloat;
    return run_conv()(x, weight, bias, stride, padding);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(5);
    if (!grads[0].defined()) return result;
    static const auto op = find_op<ConvBackward>("mmvmamba::conv2d_channel_last_backward");
    const variable_list saved = ctx->get_saved_variables();
    const FirstDerivative guard;
    const bool x_grad = ctx->saved_data["x_grad"].toBool(), has_bias = ctx->saved_data["bias"].toBool();
    const auto [dx, dw, db] = op.call(grads[0], saved[0], saved[1], ctx->saved_data["stride"].toInt(),
                                      ctx->saved_data["padding"].toInt(), x_grad, has_bias);
    if (x_grad) result[0] = dx;
    result[1] = dw;
    if (has_bias) result[2] = db.to(ctx->saved_data["bias_dtype"].toScalarType());
    return result;
  }
};

Tensor conv2d_channel_last_autograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                    int64_t stride, int64_t padding) {
  if (skips_autograd(x, weight, bias)) return run_conv()(x, weight, bias, stride, padding);
  return ConvChannelLast::apply(x, weight, bias, stride, padding);
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("conv2d_channel_last", &mmvmamba::conv2d_channel_last);
  m.impl("conv2d_channel_last_backward", &mmvmamba::conv2d_channel_last_backward);
}

TORCH_LIBRARY_IMPL(mmvmamba, AutogradCUDA, m) {
  m.impl("depthwise_conv_silu", &mmvmamba::depthwise_conv_silu);
  m.impl("conv2d_channel_last", &mmvmamba::conv2d_channel_last_autograd);
  for (const char* backward : {"depthwise_conv_silu_backward", "conv2d_channel_last_backward"}) {
    m.impl(backward, torch::autograd::autogradNotImplementedFallback());
  }
}

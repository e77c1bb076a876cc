// mmvmamba::conv2d_channel_last on CUDA, cudnn's convolution of channel-last maps as an op of its own, whose layout no
// compiler changes.
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/allocate.h"
#include "common/dense.h"
#include "fused/common/column_sum.h"
#include "fused/common/mixed_precision.h"

namespace mmvmamba {
namespace {

using at::Tensor;

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

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("conv2d_channel_last", &mmvmamba::conv2d_channel_last);
  m.impl("conv2d_channel_last_backward", &mmvmamba::conv2d_channel_last_backward);
}

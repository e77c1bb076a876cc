// mmvmamba::conv2d_channel_last on CPU, oneDNN's convolution of channel-last maps as an op of its own, whose maps no
// compiler transposes.
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace mmvmamba {
namespace {

using at::Tensor;

void check_conv2d(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(3),
              "conv2d_channel_last: x must have the shape (B, H, W, C_in) and weight (C_out, C_in, k, k), got ",
              x.sizes(), " and ", weight.sizes());
}

Tensor to_channel_first(const Tensor& x) { return x.contiguous().permute({0, 3, 1, 2}); }

Tensor to_channel_last(const Tensor& x) { return x.permute({0, 2, 3, 1}).contiguous(); }

Tensor conv2d_channel_last(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                           int64_t padding) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_conv2d(x, weight);
  const auto type = x.scalar_type();
  const auto shift = bias ? std::optional<Tensor>(bias->to(type)) : std::nullopt;
  return to_channel_last(at::convolution(to_channel_first(x), weight.to(type), shift, {stride, stride},
                                         {padding, padding}, {1, 1}, /*transposed=*/false, {0, 0}, /*groups=*/1));
}

std::tuple<Tensor, Tensor, Tensor> conv2d_channel_last_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                                int64_t stride, int64_t padding, bool x_grad,
                                                                bool bias_grad) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_conv2d(x, weight);
  const auto [dx, dweight, unused] =
      at::convolution_backward(to_channel_first(dy), to_channel_first(x), weight.to(x.scalar_type()),
                               at::OptionalIntArrayRef(), {stride, stride}, {padding, padding}, {1, 1},
                               /*transposed=*/false, {0, 0}, /*groups=*/1, std::array<bool, 3>{x_grad, true, false});
  const Tensor dbias =
      bias_grad ? dy.sum({0, 1, 2}, /*keepdim=*/false, at::kFloat) : at::empty({0}, x.options().dtype(at::kFloat));
  return {x_grad ? to_channel_last(dx) : at::empty({0}, x.options()), dweight.to(weight.scalar_type()).contiguous(),
          dbias};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("conv2d_channel_last", &mmvmamba::conv2d_channel_last);
  m.impl("conv2d_channel_last_backward", &mmvmamba::conv2d_channel_last_backward);
}

// The op mmvmamba::conv2d_channel_last: schema and autograd.
#include "common/autograd.h"
#include "common/registration.h"

namespace mmvmamba {
namespace {

struct ConvChannelLast : Differentiable {
  static constexpr const char* kName = "conv2d_channel_last";
  using Forward = Tensor(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t stride,
                         int64_t padding);
  using Backward = Tensors<3>(const Tensor& dy, const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding,
                              bool x_grad, bool bias_grad);

  static Saved save(const Tensor&, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t stride,
                    int64_t padding) {
    const auto bias_dtype = static_cast<int64_t>(bias ? bias->scalar_type() : at::kFloat);
    return {{x, weight}, {stride, padding, x.requires_grad(), bias.has_value(), bias_dtype}};
  }

  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    const bool x_grad = saved.number(2), bias = saved.number(3);
    const auto [dx, dweight, dbias] = backward_op<ConvChannelLast>().call(grads[0], saved[0], saved[1], saved.number(0),
                                                                          saved.number(1), x_grad, bias);
    return {x_grad ? dx : Tensor(), dweight, bias ? dbias.to(static_cast<at::ScalarType>(saved.number(4))) : Tensor()};
  }
};

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../fused/conv2d/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) { mmvmamba::implement_autograd<mmvmamba::ConvChannelLast>(m); }

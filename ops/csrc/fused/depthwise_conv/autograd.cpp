// The op mmvmamba::depthwise_conv_silu: schema and autograd.
#include "common/autograd.h"
#include "common/registration.h"

namespace mmvmamba {
namespace {

struct DepthwiseConvSilu : Differentiable {
  static constexpr const char* kName = "depthwise_conv_silu";
  using Forward = Tensor(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);
  using Backward = Tensors<3>(const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

  static Saved save(const Tensor&, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    return {{x, weight, or_undefined(bias)}, {}};
  }

  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    const OptionalTensor bias = or_none(saved[2]);
    const auto [dx, dweight, dbias] = backward_op<DepthwiseConvSilu>().call(grads[0], saved[0], saved[1], bias);
    return {dx, dweight, bias ? dbias : Tensor()};
  }
};

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../fused/depthwise_conv/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) { mmvmamba::implement_autograd<mmvmamba::DepthwiseConvSilu>(m); }

// The ops mmvmamba::layer_norm and add_layer_norm: schemas and autograd.
#include <ATen/ops/zeros_like.h>

#include "common/autograd.h"
#include "common/registration.h"

namespace mmvmamba {
namespace {

struct LayerNorm : Differentiable {
  static constexpr const char* kName = "layer_norm";
  using Forward = Tensors<2>(const Tensor& x, const OptionalTensor& shift, const Tensor& weight, const Tensor& bias,
                             double eps, int64_t output_type, bool gelu, bool training);
  using Backward = Tensors<4>(const Tensor& dy, const Tensor& x, const OptionalTensor& shift, const Tensor& weight,
                              const Tensor& bias, const Tensor& statistics, bool gelu);

  static Saved save(const Tensors<2>& results, const Tensor& x, const OptionalTensor& shift, const Tensor& weight,
                    const Tensor& bias, double, int64_t, bool gelu, bool) {
    // backward reads the bias for GELU only
    return {{x, or_undefined(shift), weight, gelu ? bias : weight, std::get<1>(results)}, {gelu}};
  }

  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    const OptionalTensor shift = or_none(saved[1]);
    const auto [dx, dshift, dweight, dbias] =
        backward_op<LayerNorm>().call(grads[0], saved[0], shift, saved[2], saved[3], saved[4], saved.number(0));
    return {dx, shift ? dshift : Tensor(), dweight, dbias};
  }
};

struct AddLayerNorm : Differentiable {
  static constexpr const char* kName = "add_layer_norm";
  static constexpr size_t kOutputs = 2;
  using Forward = Tensors<3>(const Tensor& x, const Tensor& branch, const OptionalTensor& factors, const Tensor& weight,
                             const Tensor& bias, double eps, bool training);
  using Backward = Tensors<4>(const Tensor& dsum, const Tensor& dy, const Tensor& sum, const OptionalTensor& factors,
                              const Tensor& weight, const Tensor& statistics);

  static Saved save(const Tensors<3>& results, const Tensor&, const Tensor&, const OptionalTensor& factors,
                    const Tensor& weight, const Tensor&, double, bool) {
    const auto& [sum, y, statistics] = results;
    // of y backward needs the dtype alone, and whoever gets y may change it in place
    return {{sum, or_undefined(factors), weight, statistics}, {static_cast<int64_t>(y.scalar_type())}};
  }

  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    const Tensor dsum = grads[0].defined() ? grads[0] : at::zeros_like(saved[0]);
    const auto type = static_cast<at::ScalarType>(saved.number(0));
    const Tensor dy = grads[1].defined() ? grads[1] : at::zeros_like(saved[0], saved[0].options().dtype(type));
    const auto [dx, dbranch, dweight, dbias] =
        backward_op<AddLayerNorm>().call(dsum, dy, saved[0], or_none(saved[1]), saved[2], saved[3]);
    return {dx, dbranch, Tensor(), dweight, dbias};
  }
};

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../fused/layer_norm/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) {
  mmvmamba::implement_autograd<mmvmamba::LayerNorm>(m);
  mmvmamba::implement_autograd<mmvmamba::AddLayerNorm>(m);
}

// The op mmvmamba::mlp: schema and autograd.
#include "common/autograd.h"
#include "common/registration.h"

namespace mmvmamba {
namespace {

struct Mlp : Differentiable {
  static constexpr const char* kName = "mlp";
  using Forward = Tensors<2>(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                             const Tensor& bias2, bool training);
  using Backward = Tensors<5>(const Tensor& dy, const Tensor& x, const Tensor& hidden, const Tensor& weight1,
                              const Tensor& weight2);

  static Saved save(const Tensors<2>& results, const Tensor& x, const Tensor& weight1, const Tensor&,
                    const Tensor& weight2, const Tensor&, bool) {
    return {{x, std::get<1>(results), weight1, weight2}, {}};
  }

  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    return to_list(backward_op<Mlp>().call(grads[0], saved[0], saved[1], saved[2], saved[3]));
  }
};

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../fused/mlp/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) { mmvmamba::implement_autograd<mmvmamba::Mlp>(m); }

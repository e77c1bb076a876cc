// The op mmvmamba::linear: schema and autograd.
#include "common/autograd.h"
#include "common/registration.h"

namespace mmvmamba {
namespace {

struct Linear : Differentiable {
  static constexpr const char* kName = "linear";
  using Forward = Tensors<2>(const Tensor& x, const Tensor& weight, bool training);
  using Backward = Tensors<2>(const Tensor& dy, const Tensor& x, const Tensor& narrow);

  static Saved save(const Tensors<2>& results, const Tensor& x, const Tensor&, bool) {
    return {{x, std::get<1>(results)}, {}};
  }

  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    return to_list(backward_op<Linear>().call(grads[0], saved[0], saved[1]));
  }
};

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../fused/linear/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) { mmvmamba::implement_autograd<mmvmamba::Linear>(m); }

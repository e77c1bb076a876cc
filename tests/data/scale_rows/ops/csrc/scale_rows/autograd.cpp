// The op mmvmamba::scale_rows: schema and autograd.
#include "common/autograd.h"
#include "common/registration.h"

namespace mmvmamba {
namespace {

struct ScaleRows : Differentiable {
  static constexpr const char* kName = "scale_rows";
  using Forward = Tensor(const Tensor& x, const Tensor& factors);
  using Backward = Tensors<2>(const Tensor& dy, const Tensor& x, const Tensor& factors);
  static Saved save(const Tensor&, const Tensor& x, const Tensor& factors) { return {{x, factors}, {}}; }
  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    return to_list(backward_op<ScaleRows>().call(grads[0], saved[0], saved[1]));
  }
};

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../scale_rows/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) { mmvmamba::implement_autograd<mmvmamba::ScaleRows>(m); }

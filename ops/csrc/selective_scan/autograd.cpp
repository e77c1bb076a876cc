// The op mmvmamba::selective_scan: schema, autograd and autocast.
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "common/autograd.h"
#include "common/registration.h"

namespace mmvmamba {
namespace {

struct SelectiveScan : Differentiable {
  static constexpr const char* kName = "selective_scan";
  using Forward = Tensors<2>(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                             const OptionalTensor& D, const OptionalTensor& delta_bias, bool delta_softplus,
                             bool float_output, const OptionalTensor& z, const OptionalTensor& initial_state);
  using Backward = Tensors<7>(const Tensor& dout, const Tensor& u, const Tensor& delta, const Tensor& A,
                              const Tensor& B, const Tensor& C, const OptionalTensor& D,
                              const OptionalTensor& delta_bias, const Tensor& states, bool delta_softplus);

  static Saved save(const Tensors<2>& results, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                    const Tensor& C, const OptionalTensor& D, const OptionalTensor& delta_bias, bool delta_softplus,
                    bool, const OptionalTensor&, const OptionalTensor&) {
    return {{u, delta, A, B, C, or_undefined(D), or_undefined(delta_bias), std::get<1>(results)}, {delta_softplus}};
  }

  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    const OptionalTensor D = or_none(saved[5]), bias = or_none(saved[6]);
    const auto [du, ddelta, dA, dB, dC, dD, dbias] = backward_op<SelectiveScan>().call(
        grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], D, bias, saved[7], saved.number(0));
    return {du, ddelta, dA, dB, dC, D ? dD : Tensor(), bias ? dbias : Tensor()};
  }
};

// u, delta, B and C in their common dtype; the weights in that of the state.
Tensors<2> autocast(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                    const OptionalTensor& D, const OptionalTensor& delta_bias, bool delta_softplus, bool float_output,
                    const OptionalTensor& z, const OptionalTensor& initial_state) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::ScalarType dtype = u.scalar_type();
  for (const Tensor* t : {&delta, &B, &C}) dtype = c10::promoteTypes(dtype, t->scalar_type());
  const auto state = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const auto cast = [&](const OptionalTensor& t) { return t ? OptionalTensor(t->to(state)) : std::nullopt; };
  return forward_op<SelectiveScan>().call(u.to(dtype), delta.to(dtype), A.to(state), B.to(dtype), C.to(dtype), cast(D),
                                          cast(delta_bias), delta_softplus, float_output, z, cast(initial_state));
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../selective_scan/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) { mmvmamba::implement_autograd<mmvmamba::SelectiveScan>(m); }

TORCH_LIBRARY_IMPL(mmvmamba, AutocastCPU, m) { m.impl("selective_scan", &mmvmamba::autocast); }
TORCH_LIBRARY_IMPL(mmvmamba, AutocastCUDA, m) { m.impl("selective_scan", &mmvmamba::autocast); }

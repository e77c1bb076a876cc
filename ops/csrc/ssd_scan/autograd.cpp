// The op mmvmamba::ssd_scan: schema, autograd and autocast. Its kernel for the CPU is torch's matrix products, in
// ops/ssd_scan/chunked.py.
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "common/autograd.h"
#include "common/registration.h"

namespace mmvmamba {
namespace {

struct SsdScan : Differentiable {
  static constexpr const char* kName = "ssd_scan";
  static constexpr size_t kOutputs = 2;
  using Forward = Tensors<2>(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                             const OptionalTensor& D, const OptionalTensor& dt_bias,
                             const OptionalTensor& initial_state, bool dt_softplus, bool float_output, bool keep_state,
                             c10::SymInt height, c10::SymInt width, int64_t scan_mode);
  using Backward = Tensors<8>(const OptionalTensor& dout, const OptionalTensor& dlast_state, const Tensor& x,
                              const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                              const OptionalTensor& D, const OptionalTensor& dt_bias,
                              const OptionalTensor& initial_state, bool dt_softplus, c10::SymInt height,
                              c10::SymInt width, int64_t scan_mode);

  static Saved save(const Tensors<2>&, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                    const Tensor& C, const OptionalTensor& D, const OptionalTensor& dt_bias,
                    const OptionalTensor& initial_state, bool dt_softplus, bool, bool keep_state,
                    const c10::SymInt& height, const c10::SymInt& width, int64_t scan_mode) {
    return {{x, dt, A, B, C, or_undefined(D), or_undefined(dt_bias), or_undefined(initial_state)},
            {dt_softplus, height, width, scan_mode, keep_state}};
  }

  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    const OptionalTensor D = or_none(saved[5]), bias = or_none(saved[6]), initial = or_none(saved[7]);
    const OptionalTensor dlast = saved.number(4) ? or_none(grads[1]) : std::nullopt;
    const auto [dx, ddt, dA, dB, dC, dD, dbias, dinitial] =
        backward_op<SsdScan>().call(or_none(grads[0]), dlast, saved[0], saved[1], saved[2], saved[3], saved[4], D, bias,
                                    initial, saved.number(0), saved.numbers[1], saved.numbers[2], saved.number(3));
    return {dx, ddt, dA, dB, dC, D ? dD : Tensor(), bias ? dbias : Tensor(), initial ? dinitial : Tensor()};
  }
};

// x, dt, B and C in their common dtype; the weights and the state in that of the state.
Tensors<2> autocast_ssd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                        const OptionalTensor& D, const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
                        bool dt_softplus, bool float_output, bool keep_state, c10::SymInt height, c10::SymInt width,
                        int64_t scan_mode) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::ScalarType dtype = x.scalar_type();
  for (const Tensor* t : {&dt, &B, &C}) dtype = c10::promoteTypes(dtype, t->scalar_type());
  const auto state = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const auto cast = [&](const OptionalTensor& t) { return t ? OptionalTensor(t->to(state)) : std::nullopt; };
  return forward_op<SsdScan>().call(x.to(dtype), dt.to(dtype), A.to(state), B.to(dtype), C.to(dtype), cast(D),
                                    cast(dt_bias), cast(initial_state), dt_softplus, float_output, keep_state,
                                    std::move(height), std::move(width), scan_mode);
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../ssd_scan/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) { mmvmamba::implement_autograd<mmvmamba::SsdScan>(m); }

TORCH_LIBRARY_IMPL(mmvmamba, AutocastCPU, m) { m.impl("ssd_scan", &mmvmamba::autocast_ssd); }
TORCH_LIBRARY_IMPL(mmvmamba, AutocastCUDA, m) { m.impl("ssd_scan", &mmvmamba::autocast_ssd); }

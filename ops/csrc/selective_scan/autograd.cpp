// The op mmvmamba::selective_scan: schema, autograd and autocast.
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstring>

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

// Each row's last state twice, for each chunk, and behind all rows the states; sizes as in pack_carries.
template <typename T> void pack_rows(const T* states, T* to, int64_t rows, int64_t row, int64_t copies, int64_t N) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* last = states + (r + 1) * row - N;
    for (int64_t i = 0; i < copies; ++i) *to++ = last[i / 2 % N];
  }
}

// What mmvmamba/compat/carries.py lays out, at a fraction of the cost to the host.
Tensor pack_carries(const Tensor& states_, int64_t chunks) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor states = states_.contiguous();
  const int64_t batch = states.size(0), dim = states.size(1), N = states.size(3), row = states.size(2) * N;
  const int64_t width = 2 * chunks * N, size = batch * dim * width, tail = states.size(2) > 2 ? states.numel() : 0;
  const Tensor storage = at::empty({size + tail}, states.options());
  if (states.is_cpu()) {
    if (states.scalar_type() == at::kDouble) {
      pack_rows(states.const_data_ptr<double>(), storage.mutable_data_ptr<double>(), batch * dim, row, width, N);
    } else {
      pack_rows(states.const_data_ptr<float>(), storage.mutable_data_ptr<float>(), batch * dim, row, width, N);
    }
    auto* bytes = static_cast<char*>(storage.mutable_data_ptr());
    std::memcpy(bytes + size * states.element_size(), states.const_data_ptr(), tail * states.element_size());
  } else {
    const Tensor last = states.as_strided({batch, dim, chunks, N, 2}, {dim * row, row, 0, 1, 0}, row - N);
    storage.as_strided(last.sizes(), {dim * width, width, 2 * N, 2, 1}).copy_(last);
    if (tail > 0) storage.as_strided(states.sizes(), states.strides(), size).copy_(states);
  }
  return storage.as_strided({batch, dim, chunks, 2 * N}, {dim * width, width, 2 * N, 1});
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../selective_scan/schema.inc"
  );
  m.def("pack_carries(Tensor states, int chunks) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmvmamba, CompositeExplicitAutograd, m) { m.impl("pack_carries", &mmvmamba::pack_carries); }

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) { mmvmamba::implement_autograd<mmvmamba::SelectiveScan>(m); }

TORCH_LIBRARY_IMPL(mmvmamba, AutocastCPU, m) { m.impl("selective_scan", &mmvmamba::autocast); }
TORCH_LIBRARY_IMPL(mmvmamba, AutocastCUDA, m) { m.impl("selective_scan", &mmvmamba::autocast); }

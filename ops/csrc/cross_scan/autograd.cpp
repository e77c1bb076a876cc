// The ops mmvmamba::cross_scan and cross_merge, each the adjoint of the other: schemas and autograd.
#include "common/autograd.h"
#include "common/registration.h"

namespace mmvmamba {
namespace {

struct CrossScan : Differentiable {
  static constexpr const char* kName = "cross_scan";
  static constexpr bool kLinear = true;
  using Forward = Tensor(const Tensor& x, int64_t scan_mode, bool channel_last);
  static Saved save(const Tensor&, const Tensor& x, int64_t scan_mode, bool channel_last) {
    return {{}, {x.sym_size(channel_last ? 1 : 2), x.sym_size(channel_last ? 2 : 3), scan_mode, channel_last}};
  }
  static variable_list differentiate(const variable_list& grads, const Saved& saved);
};

struct CrossMerge : Differentiable {
  static constexpr const char* kName = "cross_merge";
  static constexpr bool kLinear = true;
  using Forward = Tensor(const Tensor& y, c10::SymInt height, c10::SymInt width, int64_t scan_mode, bool channel_last);
  static Saved save(const Tensor&, const Tensor&, const c10::SymInt&, const c10::SymInt&, int64_t scan_mode,
                    bool channel_last) {
    return {{}, {scan_mode, channel_last}};
  }
  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    return {forward_op<CrossScan>().call(grads[0], saved.number(0), saved.number(1))};
  }
};

variable_list CrossScan::differentiate(const variable_list& grads, const Saved& saved) {
  return {
      forward_op<CrossMerge>().call(grads[0], saved.numbers[0], saved.numbers[1], saved.number(2), saved.number(3))};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../cross_scan/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) {
  mmvmamba::implement_autograd<mmvmamba::CrossScan>(m);
  mmvmamba::implement_autograd<mmvmamba::CrossMerge>(m);
}

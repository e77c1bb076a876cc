// The op mmvmamba::ss2d_scan: schema, autograd and constants.
#include "common/autograd.h"
#include "common/constants.h"
#include "common/registration.h"
#include "ss2d/layout.h"
#include "ss2d/states/layout.h"

namespace mmvmamba {
namespace {

struct Scan : Differentiable {
  static constexpr const char* kName = "ss2d_scan";
  using Forward = Tensors<3>(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias,
                             const Tensor& A_logs, const Tensor& Ds, int64_t scan_mode, bool float_output,
                             bool training, const OptionalTensor& z);
  using Backward = Tensors<6>(const Tensor& dy, const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj,
                              const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds, const Tensor& projections,
                              const Tensor& states, int64_t scan_mode);

  static Saved save(const Tensors<3>& results, const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj,
                    const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds, int64_t scan_mode, bool, bool,
                    const OptionalTensor&) {
    const auto& [y, projections, states] = results;
    return {{x, x_proj, dt_proj, dt_bias, A_logs, Ds, projections, states}, {scan_mode}};
  }

  static variable_list differentiate(const variable_list& grads, const Saved& saved) {
    return to_list(backward_op<Scan>().call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                                            saved[6], saved[7], saved.number(0)));
  }
};

const AddConstants add_constants(
    {{"ss2d_scan.cuda.segment", {ss2d::kSegment}},
     {"ss2d_scan.cuda.lanes", {ss2d::kGroup}},
     {"ss2d_scan.cuda.ranks", {ss2d::kRanks[0], ss2d::kRanks[1]}},
     {"ss2d_scan.cuda.columns", {ss2d::kRankColumns[0], ss2d::kRankColumns[1], ss2d::kColumnStep}},
     {"ss2d_scan.cuda.states.numbers",
      std::vector<int64_t>(std::begin(ss2d::states::kStates), std::end(ss2d::states::kStates))},
     {"ss2d_scan.cuda.states.segment", {ss2d::states::kSegment}},
     {"ss2d_scan.cuda.states.columns", {ss2d::states::kDtStep, ss2d::states::kColumnStep}}});

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba, m) {
  mmvmamba::define_ops(m,
#include "../ss2d/schema.inc"
  );
}

TORCH_LIBRARY_IMPL(mmvmamba, Autograd, m) { mmvmamba::implement_autograd<mmvmamba::Scan>(m); }

// Autograd of the fused SS2D core, in C++, because a gradient function in Python costs the host more than the kernels
// cost the GPU. The schemas are those of ops/ss2d/library.py.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "common/autograd.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                   const Tensor&, const Tensor&, std::string, at::ScalarType, bool);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&, std::string);

const BelowAutograd<Forward>& run_scan() {
  static const BelowAutograd<Forward> op("mmvmamba::ss2d_scan");
  return op;
}

const BelowAutograd<Backward>& run_scan_backward() {
  static const BelowAutograd<Backward> op("mmvmamba::ss2d_scan_backward");
  return op;
}

// The gradient as a function whose own gradient is refused rather than wrong.
struct ScanBackward : torch::autograd::Function<ScanBackward> {
  static variable_list forward(AutogradContext*, const Tensor& dy, const Tensor& x, const Tensor& x_proj,
                               const Tensor& dt_proj, const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds,
                               const Tensor& maps, const Tensor& states, std::string scan_mode) {
    const auto [dx, dx_proj, ddt_proj, dbias, dA_logs, dDs] =
        run_scan_backward()(dy, x, x_proj, dt_proj, dt_bias, A_logs, Ds, maps, states, scan_mode);
    return {dx, dx_proj, ddt_proj, dbias, dA_logs, dDs};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "ss2d_scan: second derivatives are not compiled; backend='naive' has them, being plain PyTorch");
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& dy, const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias,
    const Tensor& A_logs, const Tensor& Ds, const Tensor& maps, const Tensor& states, std::string scan_mode) {
  if (skips_autograd(dy, x, x_proj, dt_proj, dt_bias, A_logs, Ds, maps, states)) {
    return run_scan_backward()(dy, x, x_proj, dt_proj, dt_bias, A_logs, Ds, maps, states, scan_mode);
  }
  const auto out = ScanBackward::apply(dy, x, x_proj, dt_proj, dt_bias, A_logs, Ds, maps, states, scan_mode);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

struct Scan : torch::autograd::Function<Scan> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj,
                               const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds, std::string scan_mode,
                               at::ScalarType out_dtype, bool training) {
    const auto [y, maps, states] = run_scan()(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode, out_dtype, training);
    ctx->save_for_backward({x, x_proj, dt_proj, dt_bias, A_logs, Ds, maps, states});
    ctx->mark_non_differentiable({maps, states});
    ctx->set_materialize_grads(false);
    ctx->saved_data["scan_mode"] = scan_mode;
    return {y, maps, states};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(9);
    if (!grads[0].defined()) return result;
    static const auto op = find_op<Backward>("mmvmamba::ss2d_scan_backward");
    const variable_list saved = ctx->get_saved_variables();
    const FirstDerivative guard;
    std::tie(result[0], result[1], result[2], result[3], result[4], result[5]) =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7],
                ctx->saved_data["scan_mode"].toStringRef());
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> scan(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj,
                                        const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds,
                                        std::string scan_mode, at::ScalarType out_dtype, bool training) {
  if (skips_autograd(x, x_proj, dt_proj, dt_bias, A_logs, Ds)) {
    return run_scan()(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode, out_dtype, training);
  }
  const auto out = Scan::apply(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode, out_dtype, training);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmvmamba, AutogradCPU, m) {
  m.impl("ss2d_scan", &scan);
  m.impl("ss2d_scan_backward", &scan_backward);
}

#ifdef MMVMAMBA_WITH_CUDA
TORCH_LIBRARY_IMPL(mmvmamba, AutogradCUDA, m) {
  m.impl("ss2d_scan", &scan);
  m.impl("ss2d_scan_backward", &scan_backward);
}
#endif

}  // namespace mmvmamba

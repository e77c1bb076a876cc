// Autograd of the fused ops layer_norm, add_layer_norm, linear and mlp on CUDA. In C++, because a gradient function
// in Python costs the host more than these kernels cost the GPU. The schemas are those of ops/*/library.py.
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>

#include "common/autograd.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- layer_norm -----------------------------------------------------------------------------------------------------
using NormForward = std::tuple<Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&, const Tensor&,
                                               const Tensor&, double, at::ScalarType, bool, bool);
using NormBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                const std::optional<Tensor>&, const Tensor&,
                                                                const Tensor&, const Tensor&, bool);

const BelowAutograd<NormForward>& run_norm() {
  static const BelowAutograd<NormForward> op("mmvmamba::layer_norm");
  return op;
}

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& shift,
                               const Tensor& weight, const Tensor& bias, double eps, at::ScalarType out_dtype,
                               bool gelu, bool training) {
    const auto [y, statistics] = run_norm()(x, shift, weight, bias, eps, out_dtype, gelu, training);
    // backward reads the bias for GELU only
    ctx->save_for_backward({x, shift.value_or(Tensor()), weight, gelu ? bias : weight, statistics});
    ctx->saved_data["gelu"] = gelu;
    ctx->mark_non_differentiable({statistics});
    ctx->set_materialize_grads(false);
    return {y, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(8);
    if (!grads[0].defined()) return result;
    static const auto op = find_op<NormBackward>("mmvmamba::layer_norm_backward");
    const variable_list saved = ctx->get_saved_variables();
    const FirstDerivative guard;
    const auto shift = saved[1].defined() ? std::optional<Tensor>(saved[1]) : std::nullopt;
    const auto [dx, dshift, dweight, dbias] =
        op.call(grads[0], saved[0], shift, saved[2], saved[3], saved[4], ctx->saved_data["gelu"].toBool());
    result[0] = dx, result[2] = dweight, result[3] = dbias;
    if (shift) result[1] = dshift;
    return result;
  }
};

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& shift, const Tensor& weight,
                                      const Tensor& bias, double eps, at::ScalarType out_dtype, bool gelu,
                                      bool training) {
  if (skips_autograd(x, shift, weight, bias)) {
    return run_norm()(x, shift, weight, bias, eps, out_dtype, gelu, training);
  }
  const auto out = LayerNorm::apply(x, shift, weight, bias, eps, out_dtype, gelu, training);
  return {out[0], out[1]};
}

// ---- add_layer_norm -------------------------------------------------------------------------------------------------
using AddNormForward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                                          const Tensor&, const Tensor&, double, at::ScalarType, bool);
using AddNormBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                   const std::optional<Tensor>&, const Tensor&,
                                                                   const Tensor&);

const BelowAutograd<AddNormForward>& run_add_norm() {
  static const BelowAutograd<AddNormForward> op("mmvmamba::add_layer_norm");
  return op;
}

struct AddLayerNorm : torch::autograd::Function<AddLayerNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& branch,
                               const std::optional<Tensor>& factors, const Tensor& weight, const Tensor& bias,
                               double eps, at::ScalarType out_dtype, bool training) {
    const auto [sum, y, statistics] = run_add_norm()(x, branch, factors, weight, bias, eps, out_dtype, training);
    ctx->save_for_backward({sum, factors.value_or(Tensor()), weight, statistics, y});
    ctx->mark_non_differentiable({statistics});
    ctx->set_materialize_grads(false);
    return {sum, y, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(8);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    static const auto op = find_op<AddNormBackward>("mmvmamba::add_layer_norm_backward");
    const variable_list saved = ctx->get_saved_variables();
    const FirstDerivative guard;
    const Tensor dsum = grads[0].defined() ? grads[0] : at::zeros_like(saved[0]);
    const Tensor dy = grads[1].defined() ? grads[1] : at::zeros_like(saved[4]);
    const auto factors = saved[1].defined() ? std::optional<Tensor>(saved[1]) : std::nullopt;
    std::tie(result[0], result[1], result[3], result[4]) = op.call(dsum, dy, saved[0], factors, saved[2], saved[3]);
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& branch,
                                                  const std::optional<Tensor>& factors, const Tensor& weight,
                                                  const Tensor& bias, double eps, at::ScalarType out_dtype,
                                                  bool training) {
  if (skips_autograd(x, branch, factors, weight, bias)) {
    return run_add_norm()(x, branch, factors, weight, bias, eps, out_dtype, training);
  }
  const auto out = AddLayerNorm::apply(x, branch, factors, weight, bias, eps, out_dtype, training);
  return {out[0], out[1], out[2]};
}

// ---- linear ---------------------------------------------------------------------------------------------------------
using LinearForward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, bool);
using LinearBackward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&);

const BelowAutograd<LinearForward>& run_linear() {
  static const BelowAutograd<LinearForward> op("mmvmamba::linear");
  return op;
}

struct Linear : torch::autograd::Function<Linear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, bool training) {
    const auto [y, narrow] = run_linear()(x, weight, training);
    ctx->save_for_backward({x, narrow});
    ctx->mark_non_differentiable({narrow});
    ctx->set_materialize_grads(false);
    return {y, narrow};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    static const auto op = find_op<LinearBackward>("mmvmamba::linear_backward");
    const variable_list saved = ctx->get_saved_variables();
    const FirstDerivative guard;
    std::tie(result[0], result[1]) = op.call(grads[0], saved[0], saved[1]);
    return result;
  }
};

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, bool training) {
  if (skips_autograd(x, weight)) return run_linear()(x, weight, training);
  const auto out = Linear::apply(x, weight, training);
  return {out[0], out[1]};
}

// ---- mlp ------------------------------------------------------------------------------------------------------------
using MlpForward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              bool);
using MlpBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                       const Tensor&, const Tensor&);

const BelowAutograd<MlpForward>& run_mlp() {
  static const BelowAutograd<MlpForward> op("mmvmamba::mlp");
  return op;
}

struct Mlp : torch::autograd::Function<Mlp> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight1, const Tensor& bias1,
                               const Tensor& weight2, const Tensor& bias2, bool training) {
    const auto [y, hidden] = run_mlp()(x, weight1, bias1, weight2, bias2, training);
    ctx->save_for_backward({x, hidden, weight1, weight2});
    ctx->mark_non_differentiable({hidden});
    ctx->set_materialize_grads(false);
    return {y, hidden};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (!grads[0].defined()) return result;
    static const auto op = find_op<MlpBackward>("mmvmamba::mlp_backward");
    const variable_list saved = ctx->get_saved_variables();
    const FirstDerivative guard;
    std::tie(result[0], result[1], result[2], result[3], result[4]) =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3]);
    return result;
  }
};

std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                               const Tensor& bias2, bool training) {
  if (skips_autograd(x, weight1, bias1, weight2, bias2)) {
    return run_mlp()(x, weight1, bias1, weight2, bias2, training);
  }
  const auto out = Mlp::apply(x, weight1, bias1, weight2, bias2, training);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmvmamba, AutogradCUDA, m) {
  m.impl("layer_norm", &layer_norm);
  m.impl("add_layer_norm", &add_layer_norm);
  m.impl("linear", &linear);
  m.impl("mlp", &mlp);
  for (const char* backward :
       {"layer_norm_backward", "add_layer_norm_backward", "linear_backward", "mlp_backward"}) {
    m.impl(backward, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace mmvmamba

// Linear layers by oneDNN with what follows them, through torch's own op where this torch and this processor have it.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <optional>
#include <string>
#include <utility>

namespace mmvmamba {

inline const std::optional<c10::OperatorHandle>& find_linear_pointwise() {
  static const auto found = [] {
    auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    const bool known = op && op->schema().arguments().size() == 6 && op->hasKernelForDispatchKey(c10::DispatchKey::CPU);
    return known ? op : std::nullopt;
  }();
  return found;
}

inline bool has_one_dnn_bfloat16() {
  static const bool has = [] {
    const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
    if (!op) return false;
    torch::jit::Stack stack;
    op->callBoxed(&stack);
    return stack.at(0).toBool();
  }();
  return has;
}

// Whether oneDNN serves linear layers of this dtype: torch's switch for it is on, and it has the op and the units.
inline bool has_one_dnn_linear(at::ScalarType type) {
  return at::hasMKLDNN() && at::globalContext().userEnabledMkldnn() && find_linear_pointwise() &&
         (type == at::kFloat || (type == at::kBFloat16 && has_one_dnn_bfloat16()));
}

// x (rows, C) -> (rows, C_out) = weight x + bias, or GELU of that. Everything of one dtype. Through the boxed
// interface, which is one for all releases of torch.
inline at::Tensor one_dnn_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                 bool gelu) {
  torch::jit::Stack stack{x,
                          weight,
                          bias ? c10::IValue(*bias) : c10::IValue(),
                          std::string(gelu ? "gelu" : "none"),
                          c10::List<std::optional<at::Scalar>>(),
                          std::string("none")};
  find_linear_pointwise()->callBoxed(&stack);
  return stack.at(0).toTensor();
}

}  // namespace mmvmamba

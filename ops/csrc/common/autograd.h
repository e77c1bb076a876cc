// What the autograd functions of the ops share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>

namespace mmvmamba {

template <typename Signature> auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// An op called below autograd.
template <typename Signature> class BelowAutograd {
 public:
  explicit BelowAutograd(const char* name) : op_(find_op<Signature>(name)) {}
  template <typename... Args> auto operator()(const Args&... args) const {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op_.call(args...);
  }

 private:
  c10::TypedOperatorHandle<Signature> op_;
};

inline bool has_tangent(const at::Tensor& x) { return x.defined() && x._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& x) { return x && has_tangent(*x); }

// Whether autograd has nothing to do with a call of `tensors`, as in a compiled model, whose graph is the compiler's:
// its bookkeeping costs the host as much as a launch. Forward derivatives are left to it to refuse.
template <typename... Tensors> bool skips_autograd(const Tensors&... tensors) {
  return !at::GradMode::is_enabled() && !(has_tangent(tensors) || ...);
}

// The calls of a gradient function go past autograd, which costs the host, unless second derivatives are asked for: these
// autograd refuses.
// To be made after the saved tensors are taken: under activation checkpointing taking them runs the forward again.
class FirstDerivative {
 public:
  FirstDerivative() {
    if (!at::GradMode::is_enabled()) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

}  // namespace mmvmamba

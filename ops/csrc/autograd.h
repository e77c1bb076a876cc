// What the autograd functions of the ops share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>

namespace mmvmamba {

template <typename Signature> auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
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

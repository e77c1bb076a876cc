// Autograd of the ops: one template, which an op fits by a struct that says what backward reads and calls.
//
// An op takes part by
//   struct Example : Differentiable {
//     static constexpr const char* kName = "example";
//     using Forward = Tensors<2>(const Tensor& x, bool training);                   // as in its schema
//     using Backward = Tensor(const Tensor& dy, const Tensor& x, const Tensor& y);  // of example_backward
//     static Saved save(const Tensors<2>& results, const Tensor& x, bool training);  // what backward reads
//     static variable_list differentiate(const variable_list& grads, const Saved& saved);  // for each argument
//   };
// and implement_autograd<Example>(m) for the Autograd key. Second and forward-mode derivatives and the transforms of
// torch.func are refused by an error that names the op; vmap is torch's loop over samples. In C++, because a gradient
// function in Python costs the host more than most kernels cost the GPU.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fw_primal.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace mmvmamba {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- results of ops -------------------------------------------------------------------------------------------------
template <size_t> using OneTensor = Tensor;
template <typename Index> struct TensorTuple;
template <size_t... I> struct TensorTuple<std::index_sequence<I...>> {
  using Type = std::tuple<OneTensor<I>...>;
};
template <size_t N> using Tensors = typename TensorTuple<std::make_index_sequence<N>>::Type;

inline variable_list to_list(const Tensor& result) { return {result}; }
template <typename... T> variable_list to_list(const std::tuple<T...>& results) {
  return std::apply([](const auto&... result) { return variable_list{result...}; }, results);
}

template <typename Result> struct FromList;
template <> struct FromList<Tensor> {
  static Tensor make(const variable_list& list) { return list[0]; }
};
template <typename... T> struct FromList<std::tuple<T...>> {
  static std::tuple<T...> make(const variable_list& list) { return make(list, std::index_sequence_for<T...>()); }
  template <size_t... I> static std::tuple<T...> make(const variable_list& list, std::index_sequence<I...>) {
    return {list[I]...};
  }
};

inline Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
inline OptionalTensor or_none(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// ---- what a struct says ---------------------------------------------------------------------------------------------
struct Differentiable {
  static constexpr size_t kOutputs = 1;   // results that have gradients; those after them are for backward
  static constexpr bool kLinear = false;  // in the first argument, the only tensor: then all derivatives are right
};

// What backward reads. Sizes may be symbols when a graph is traced.
struct Saved {
  variable_list tensors;
  std::vector<c10::SymInt> numbers;
  const Tensor& operator[](size_t i) const { return tensors[i]; }
  int64_t number(size_t i) const { return numbers[i].guard_int(__FILE__, __LINE__); }
};

// ---- calling ops ----------------------------------------------------------------------------------------------------
template <typename Signature> c10::TypedOperatorHandle<Signature> find_op(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("mmvmamba::" + name).c_str(), "").typed<Signature>();
}
template <class Op> const auto& forward_op() {
  static const auto op = find_op<typename Op::Forward>(Op::kName);
  return op;
}
template <class Op> const auto& backward_op() {
  static const auto op = find_op<typename Op::Backward>(std::string(Op::kName) + "_backward");
  return op;
}

// ---- when autograd has work -----------------------------------------------------------------------------------------
inline bool has_tangent(const Tensor& x) { return x.defined() && x._fw_grad(/*level=*/0).defined(); }
inline bool requires_grad(const Tensor& x) { return x.defined() && x.requires_grad(); }
inline bool has_tangent(const OptionalTensor& x) { return x && has_tangent(*x); }
inline bool requires_grad(const OptionalTensor& x) { return x && requires_grad(*x); }
template <typename T> std::enable_if_t<!std::is_convertible_v<T, OptionalTensor>, bool> has_tangent(const T&) {
  return false;
}
template <typename T> std::enable_if_t<!std::is_convertible_v<T, OptionalTensor>, bool> requires_grad(const T&) {
  return false;
}

// Whether a transform of torch.func takes gradients; vmap alone never comes this far.
inline bool is_transformed() {
  const auto& state = at::functorch::functorchTLSAccessor();
  if (!state) return false;
  try {
    state->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

// Whether autograd must remember a call. In a compiled model, whose graph is the compiler's, it need not: its
// bookkeeping costs the host as much as a launch.
template <typename... Args> bool needs_autograd(const char* op, const Args&... args) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(args) || ...), op,
                              ": forward-mode derivatives are not compiled; backend='naive' has them, being plain "
                              "PyTorch");
  if (!at::GradMode::is_enabled() || !(requires_grad(args) || ...)) return false;
  TORCH_CHECK_NOT_IMPLEMENTED(!is_transformed(), op,
                              ": torch.func's derivatives are not compiled; backend='naive' has them, being plain "
                              "PyTorch, and torch.autograd works");
  return true;
}

// The calls of a gradient function go past autograd, which costs the host, unless second derivatives are asked for.
// To be made after the saved tensors are taken: under activation checkpointing taking them runs the forward again.
class FirstDerivative {
 public:
  FirstDerivative() {
    if (!at::GradMode::is_enabled()) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

// ---- nodes of the graph ---------------------------------------------------------------------------------------------
template <typename Signature> struct Arguments;
template <typename Result, typename... Args> struct Arguments<Result(Args...)> {
  static constexpr size_t kCount = sizeof...(Args);
};

template <class Op> struct Node : torch::autograd::Function<Node<Op>> {
  template <typename... Args> static variable_list forward(AutogradContext* ctx, const Args&... args) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto results = forward_op<Op>().call(args...);
    Saved saved = Op::save(results, args...);
    ctx->save_for_backward(std::move(saved.tensors));
    if (!saved.numbers.empty()) ctx->saved_data["numbers"] = std::move(saved.numbers);
    variable_list list = to_list(results);
    if (list.size() > Op::kOutputs) ctx->mark_non_differentiable({list.begin() + Op::kOutputs, list.end()});
    ctx->set_materialize_grads(false);
    return list;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result;
    bool any = false;
    for (size_t i = 0; i < Op::kOutputs; ++i) any = any || grads[i].defined();
    if (any) {
      const auto numbers = ctx->saved_data.find("numbers");
      const Saved saved{ctx->get_saved_variables(), numbers == ctx->saved_data.end()
                                                        ? std::vector<c10::SymInt>()
                                                        : numbers->second.toSymIntVector()};
      const FirstDerivative guard;
      result = Op::differentiate(grads, saved);
    }
    result.resize(Arguments<typename Op::Forward>::kCount);
    return result;
  }
};

// A gradient as a function whose own gradient is refused rather than wrong.
template <class Op> struct Refusal : torch::autograd::Function<Refusal<Op>> {
  template <typename... Args> static variable_list forward(AutogradContext*, const Args&... args) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return to_list(backward_op<Op>().call(args...));
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, Op::kName,
                                ": second derivatives are not compiled; backend='naive' has them, "
                                "being plain PyTorch");
  }
};

// ---- kernels of the Autograd key ------------------------------------------------------------------------------------
template <class Op, template <class> class Function, typename Call> struct Kernel;
template <class Op, template <class> class Function, typename Result, typename... Args>
struct Kernel<Op, Function, Result(Args...)> {
  template <typename Handle> static Result run(const Handle& op, const Args&... args) {
    if (needs_autograd(Op::kName, args...)) return FromList<Result>::make(Function<Op>::apply(args...));
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(args...);
  }
  static Result forward(Args... args) { return run(forward_op<Op>(), args...); }
  static Result backward(Args... args) { return run(backward_op<Op>(), args...); }
};

// A linear op is its own forward-mode derivative.
template <class Op, typename Call> struct LinearKernel;
template <class Op, typename... Rest> struct LinearKernel<Op, Tensor(const Tensor&, Rest...)> {
  static Tensor forward(const Tensor& x, Rest... rest) {
    using Plain = Kernel<Op, Node, typename Op::Forward>;
    if (!has_tangent(x)) return Plain::forward(x, rest...);
    const Tensor y = Plain::forward(x._fw_primal(/*level=*/0), rest...);
    y._set_fw_grad(Plain::forward(x._fw_grad(/*level=*/0), rest...), /*level=*/0, /*is_inplace_op=*/false);
    return y;
  }
};

template <class Op> void implement_autograd(torch::Library& library) {
  if constexpr (Op::kLinear) {
    library.impl(Op::kName, &LinearKernel<Op, typename Op::Forward>::forward);
  } else {
    library.impl(Op::kName, &Kernel<Op, Node, typename Op::Forward>::forward);
    const std::string backward = std::string(Op::kName) + "_backward";
    library.impl(backward.c_str(), &Kernel<Op, Refusal, typename Op::Backward>::backward);
  }
}

}  // namespace mmvmamba

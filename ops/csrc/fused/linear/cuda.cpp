// A linear layer in mixed precision, mmvmamba::linear and its backward on CUDA: 16-bit input, float32 weight. The
// products are cuBLAS's. The weight is cast once for both directions, and its gradient leaves the product in float32
// (product_as), where autocast rounds it to 16 bits and casts it back.
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "common/allocate.h"
#include "fused/common/mixed_precision.h"

namespace mmvmamba {
namespace {

using at::Tensor;

// x (..., C) as a matrix.
Tensor rows_of(const Tensor& x) { return x.contiguous().view({x.numel() / x.size(-1), x.size(-1)}); }

// y (..., C_out), and with `save` the weight in the dtype of x, which backward reads.
std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, bool save) {
  const c10::cuda::CUDAGuard guard(x.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  TORCH_CHECK(weight.dim() == 2 && x.dim() > 0 && weight.size(1) == x.size(-1) && x.numel() > 0, "linear: the shapes ",
              x.sizes(), " of x and ", weight.sizes(), " of weight do not fit together");
  TORCH_CHECK((x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16) && weight.scalar_type() == at::kFloat,
              "linear: x is ", x.scalar_type(), " and weight ", weight.scalar_type(),
              ", expected float16 or bfloat16, and float32");
  const Tensor narrow = cast({weight}, x.scalar_type())[0];
  const Tensor y = at::mm(rows_of(x), narrow.t()).view(with_last(x, weight.size(0)));
  return {y, save ? narrow : allocate({0}, narrow.options())};
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& dy_in, const Tensor& x, const Tensor& narrow) {
  const c10::cuda::CUDAGuard guard(x.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  TORCH_CHECK(narrow.dim() == 2, "linear_backward: the forward was run without saving its weight");
  const Tensor dy = rows_of(dy_in.to(x.scalar_type()));
  return {at::mm(dy, narrow).view(x.sizes()), product_as(at::kFloat, dy.t(), rows_of(x))};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("linear", &mmvmamba::linear_forward);
  m.impl("linear_backward", &mmvmamba::linear_backward);
}

// What the CPU kernels of the fused layers share: element types, and parameters in float.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <type_traits>

#include "common/ceil_div.h"
#include "common/lanes.h"
#include "common/ordered_sum.h"

namespace mmvmamba {

// Call f(T()) for the element type of a dtype.
template <typename F> void with_cpu_type(const char* op, at::ScalarType type, const F& f) {
  if (type == at::kFloat) return f(float());
  TORCH_CHECK_TYPE(type == at::kBFloat16, op, ": a tensor is ", type, ", expected float32 or bfloat16");
  f(Bfloat16());
}

template <typename T> const T* elements(const at::Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <typename T> T* elements_of(at::Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

inline at::Tensor as_float(const at::Tensor& parameter) { return parameter.to(at::kFloat).contiguous(); }

}  // namespace mmvmamba

// From a dtype to a type of the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/vector.cuh"

namespace mmvmamba {

// Call f(T()) for a dtype, in the name of `op`.
template <typename F> void with_float_type(const char* op, at::ScalarType type, F f) {
  if (type == at::kHalf) return f(__half());
  if (type == at::kBFloat16) return f(__nv_bfloat16());
  TORCH_CHECK(type == at::kFloat, op, ": a tensor is ", type, ", expected float16, bfloat16 or float32");
  f(float());
}

}  // namespace mmvmamba

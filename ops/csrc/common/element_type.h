// The element types of the GPU kernels. No torch types in here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mmvmamba {

enum class Type { kHalf, kBfloat16, kFloat, kDouble };

// Call f(T()) for an element type that is not double.
template <typename F> auto with_type(Type type, F f) {
  if (type == Type::kHalf) return f(__half());
  if (type == Type::kBfloat16) return f(__nv_bfloat16());
  return f(float());
}

}  // namespace mmvmamba

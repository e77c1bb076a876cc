// From a dtype of torch to the element type of a kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/element_type.h"

namespace mmvmamba {

inline Type type_of(const char* op, at::ScalarType type, bool with_double = false) {
  if (with_double && type == at::kDouble) return Type::kDouble;
  switch (type) {
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBfloat16;
    case at::kFloat: return Type::kFloat;
    default: TORCH_CHECK_TYPE(false, op, ": a tensor is ", type, ", expected float16, bfloat16 or float32");
  }
}

}  // namespace mmvmamba

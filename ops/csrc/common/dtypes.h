// The dtype of an output in a schema, which has no ScalarType: `float_output`, whether it is float32 rather than the
// dtype of the input, or where more is possible an `output_type`, a place in kOutputTypes.
#pragma once

#include <ATen/core/Tensor.h>

namespace mmvmamba {

// OUTPUT_TYPES of ops/checks.py
constexpr at::ScalarType kOutputTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};

inline at::ScalarType output_dtype(const at::Tensor& input, bool float_output) {
  return float_output ? at::kFloat : input.scalar_type();
}

inline at::ScalarType output_dtype(const char* op, int64_t output_type) {
  TORCH_CHECK(output_type >= 0 && output_type < 3, op, ": output_type is ", output_type, ", expected 0, 1 or 2");
  return kOutputTypes[output_type];
}

// What a schema foresees and the kernels do not take yet.
inline void check_absent(const char* op, const char* name, const std::optional<at::Tensor>& argument) {
  TORCH_CHECK_NOT_IMPLEMENTED(!argument.has_value(), op, ": ", name, " is not implemented yet, expected None");
}

}  // namespace mmvmamba

// What the schema of selective_scan foresees and no kernel takes yet.
#pragma once

#include "common/dtypes.h"

namespace mmvmamba {

inline void check_supported(const at::Tensor& u, const at::Tensor& delta, const std::optional<at::Tensor>& z,
                            const std::optional<at::Tensor>& initial_state) {
  TORCH_CHECK_NOT_IMPLEMENTED(delta.size(1) == u.size(1), "selective_scan: delta has ", delta.size(1), " channels for ",
                              u.size(1), " of u; channels that share one are not implemented yet");
  check_absent("selective_scan", "z", z);
  check_absent("selective_scan", "initial_state", initial_state);
}

}  // namespace mmvmamba

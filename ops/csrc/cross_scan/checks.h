// Bounds of the arguments that the ops index memory by; their Python functions check the rest.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "common/routes.h"

namespace mmvmamba {
namespace cross {

inline void check_scan(const at::Tensor& x, int64_t mode) {
  TORCH_CHECK_VALUE(x.dim() == 4, "cross_scan: x has shape ", x.sizes(), ", expected four dimensions");
  TORCH_CHECK_VALUE(is_scan_mode(mode), "cross_scan: scan_mode is ", mode, ", expected 0 to ", kNumScanModes - 1);
}

inline void check_merge(const at::Tensor& y, int64_t height, int64_t width, int64_t mode, bool channel_last) {
  TORCH_CHECK_VALUE(height >= 0 && width >= 0 && y.dim() == 4 && y.size(channel_last ? 2 : 1) == kRoutes &&
                        y.size(channel_last ? 1 : 3) == height * width,
                    "cross_merge: y has shape ", y.sizes(), ", expected ",
                    channel_last ? "(B, L, 4, C)" : "(B, 4, C, L)", " with L = ", height, " * ", width);
  TORCH_CHECK_VALUE(is_scan_mode(mode), "cross_merge: scan_mode is ", mode, ", expected 0 to ", kNumScanModes - 1);
}

}  // namespace cross
}  // namespace mmvmamba

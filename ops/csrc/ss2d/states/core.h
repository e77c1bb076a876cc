// The fused SS2D core on CUDA for N = 2 to 16 states a channel; arguments and results are those of the op.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace mmvmamba {
namespace ss2d {
namespace states {

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& x_proj,
                                                       const at::Tensor& dt_proj, const at::Tensor& dt_bias,
                                                       const at::Tensor& A_logs, const at::Tensor& Ds,
                                                       int64_t scan_mode, bool float_output, bool save);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& x_proj, const at::Tensor& dt_proj,
    const at::Tensor& dt_bias, const at::Tensor& A_logs, const at::Tensor& Ds, const at::Tensor& projections,
    const at::Tensor& saved, int64_t scan_mode);

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

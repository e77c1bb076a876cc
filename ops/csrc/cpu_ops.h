#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace mmvmamba {

std::tuple<at::Tensor, at::Tensor> selective_scan_fwd_cpu(
    const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B, const at::Tensor& C,
    const std::optional<at::Tensor>& D, const std::optional<at::Tensor>& delta_bias, bool delta_softplus,
    at::ScalarType out_dtype);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> selective_scan_bwd_cpu(
    const at::Tensor& dout, const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const std::optional<at::Tensor>& D, const std::optional<at::Tensor>& delta_bias,
    const at::Tensor& carries, bool delta_softplus);

at::Tensor cross_scan_cpu(const at::Tensor& x, int64_t scan_mode, bool channel_last);
at::Tensor cross_merge_cpu(const at::Tensor& y, int64_t height, int64_t width, int64_t scan_mode, bool channel_last);

}  // namespace mmvmamba

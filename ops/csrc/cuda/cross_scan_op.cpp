// torch.ops.mmvmamba_C.cross_scan_cuda and cross_merge_cuda.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>

#include "cross_scan.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using namespace cross;

// cross2d, unidi, bidi, cascade2d
constexpr Routes kModes[4] = {{0b1010, 0b1100}, {0b0000, 0b0000}, {0b0000, 0b1100}, {0b1100, 0b1010}};

Type type_of(const Tensor& y) {
  switch (y.scalar_type()) {
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBfloat16;
    case at::kFloat: return Type::kFloat;
    case at::kDouble: return Type::kDouble;
    default: TORCH_CHECK_TYPE(false, "cross_merge: the CUDA kernels take floating-point tensors, got ", y.dtype());
  }
}

void check_map(const char* op, const Map& map, int64_t mode) {
  TORCH_CHECK(mode >= 0 && mode < 4, op, ": scan_mode ", mode, ", expected 0 to 3");
  TORCH_CHECK(static_cast<int64_t>(map.height) * map.width <= std::numeric_limits<int>::max() / 2, op, ": a map of ",
              map.height, " x ", map.width, " is too large for the CUDA kernels");
  TORCH_CHECK(map.channels <= std::numeric_limits<int>::max(), op, ": too many channels");
}

Tensor cross_scan(const Tensor& x_, int64_t mode, bool channel_last) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = x_.contiguous();
  const Map map{x.size(0), x.size(channel_last ? 3 : 1), static_cast<int>(x.size(channel_last ? 1 : 2)),
                static_cast<int>(x.size(channel_last ? 2 : 3))};
  check_map("cross_scan", map, mode);
  const int64_t length = static_cast<int64_t>(map.height) * map.width;
  Tensor y = channel_last ? at::empty({map.batch, length, kRoutes, map.channels}, x.options())
                          : at::empty({map.batch, kRoutes, map.channels, length}, x.options());
  const auto launch = channel_last ? launch_scan_last : launch_scan;
  launch(x.const_data_ptr(), y.data_ptr(), x.element_size(), map, kModes[mode], at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor cross_merge(const Tensor& y_, int64_t height, int64_t width, int64_t mode, bool channel_last) {
  const c10::cuda::CUDAGuard guard(y_.device());
  const Tensor y = y_.contiguous();
  const Map map{y.size(0), y.size(channel_last ? 3 : 2), static_cast<int>(height), static_cast<int>(width)};
  check_map("cross_merge", map, mode);
  Tensor x = channel_last ? at::empty({map.batch, height, width, map.channels}, y.options())
                          : at::empty({map.batch, map.channels, height, width}, y.options());
  const auto launch = channel_last ? launch_merge_last : launch_merge;
  launch(y.const_data_ptr(), x.data_ptr(), type_of(y), map, kModes[mode], at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return x;
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_FRAGMENT(mmvmamba_C, m) {
  m.def("cross_scan_cuda(Tensor x, int scan_mode, bool channel_last) -> Tensor");
  m.def("cross_merge_cuda(Tensor y, int height, int width, int scan_mode, bool channel_last) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmvmamba_C, CUDA, m) {
  m.impl("cross_scan_cuda", &mmvmamba::cross_scan);
  m.impl("cross_merge_cuda", &mmvmamba::cross_merge);
}

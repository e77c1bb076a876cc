// mmvmamba::cross_scan and cross_merge on CUDA.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>

#include "common/allocate.h"
#include "common/type_of.h"
#include "cross_scan/checks.h"
#include "cross_scan/kernels.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using namespace cross;

constexpr int64_t kMaxPixels = std::numeric_limits<int>::max() / 2;  // of a map: the kernels' steps are int

Map make_map(const char* op, const char* name, const Tensor& tensor, int64_t channels, int64_t height, int64_t width) {
  TORCH_CHECK_VALUE(height >= 1 && width >= 1 && height <= kMaxPixels / width, op, ": ", name, " has a map of ", height,
                    " x ", width, " pixels, at most ", kMaxPixels, " are supported on a GPU");
  TORCH_CHECK_VALUE(channels <= std::numeric_limits<int>::max(), op, ": ", name, " has ", channels,
                    " channels, at most ", std::numeric_limits<int>::max(), " are supported on a GPU");
  return {tensor.size(0), channels, static_cast<int>(height), static_cast<int>(width)};
}

Tensor cross_scan(const Tensor& x_, int64_t mode, bool channel_last) {
  check_scan(x_, mode);
  const c10::cuda::CUDAGuard guard(x_.device());
  const Map map = make_map("cross_scan", "x", x_, x_.size(channel_last ? 3 : 1), x_.size(channel_last ? 1 : 2),
                           x_.size(channel_last ? 2 : 3));
  const Tensor x = x_.contiguous();
  const int64_t length = static_cast<int64_t>(map.height) * map.width;
  Tensor y = channel_last ? allocate({map.batch, length, kRoutes, map.channels}, x.options())
                          : allocate({map.batch, kRoutes, map.channels, length}, x.options());
  const auto launch = channel_last ? launch_scan_last : launch_scan;
  launch(x.const_data_ptr(), y.data_ptr(), x.element_size(), map, kScanModes[mode].routes,
         at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor cross_merge(const Tensor& y_, int64_t height, int64_t width, int64_t mode, bool channel_last) {
  check_merge(y_, height, width, mode, channel_last);
  const c10::cuda::CUDAGuard guard(y_.device());
  const Map map = make_map("cross_merge", "y", y_, y_.size(channel_last ? 3 : 2), height, width);
  const Tensor y = y_.contiguous();
  Tensor x = channel_last ? allocate({map.batch, height, width, map.channels}, y.options())
                          : allocate({map.batch, map.channels, height, width}, y.options());
  const auto launch = channel_last ? launch_merge_last : launch_merge;
  const Type type = type_of("cross_merge", y.scalar_type(), /*with_double=*/true);
  launch(y.const_data_ptr(), x.data_ptr(), type, map, kScanModes[mode].routes, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return x;
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("cross_scan", &mmvmamba::cross_scan);
  m.impl("cross_merge", &mmvmamba::cross_merge);
}

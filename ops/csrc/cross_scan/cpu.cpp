// Cross-scan and cross-merge on CPU: every route is a permutation of the pixels, written down once as a table, so that
// the four modes and both layouts share two loops. A task owns one plane (channel-first) or a range of pixels.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/routes.h"
#include "cross_scan/checks.h"

namespace mmvmamba {
namespace {

// pixel[k * L + l]: the row-major pixel that route k reads at step l
std::vector<int64_t> route_pixels(int64_t mode, int64_t height, int64_t width) {
  const int64_t length = height * width;
  std::vector<int64_t> pixel(kRoutes * length);
  for (int64_t k = 0; k < kRoutes; ++k) {
    for (int64_t l = 0; l < length; ++l) pixel[k * length + l] = route_pixel(mode, k, l, height, width);
  }
  return pixel;
}

at::Tensor cross_scan(const at::Tensor& x_, int64_t mode, bool channel_last) {
  cross::check_scan(x_, mode);
  const auto x = x_.contiguous();
  const int64_t batch = x.size(0), channels = x.size(channel_last ? 3 : 1);
  const int64_t height = x.size(channel_last ? 1 : 2), width = x.size(channel_last ? 2 : 3), length = height * width;
  const auto pixel = route_pixels(mode, height, width);
  auto y = channel_last ? at::empty({batch, length, kRoutes, channels}, x.options())
                        : at::empty({batch, kRoutes, channels, length}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "cross_scan", [&] {
    const auto* from = x.const_data_ptr<scalar_t>();
    auto* to = y.data_ptr<scalar_t>();
    if (channel_last) {
      at::parallel_for(0, batch * length, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t k = 0; k < kRoutes; ++k) {
            const auto* source = from + (i / length * length + pixel[k * length + i % length]) * channels;
            std::copy(source, source + channels, to + (i * kRoutes + k) * channels);
          }
        }
      });
      return;
    }
    at::parallel_for(0, batch * kRoutes * channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t b = plane / (kRoutes * channels), k = plane / channels % kRoutes, c = plane % channels;
        const auto* source = from + (b * channels + c) * length;
        for (int64_t l = 0; l < length; ++l) to[plane * length + l] = source[pixel[k * length + l]];
      }
    });
  });
  return y;
}

at::Tensor cross_merge(const at::Tensor& y_, int64_t height, int64_t width, int64_t mode, bool channel_last) {
  cross::check_merge(y_, height, width, mode, channel_last);
  const auto y = y_.contiguous();
  const int64_t batch = y.size(0), channels = y.size(channel_last ? 3 : 2), length = height * width;
  const auto pixel = route_pixels(mode, height, width);
  std::vector<int64_t> step(kRoutes * length);  // the inverse: when route k passes a pixel
  for (int64_t k = 0; k < kRoutes; ++k) {
    for (int64_t l = 0; l < length; ++l) step[k * length + pixel[k * length + l]] = l;
  }
  auto x = channel_last ? at::empty({batch, height, width, channels}, y.options())
                        : at::empty({batch, channels, height, width}, y.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "cross_merge", [&] {
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto* from = y.const_data_ptr<scalar_t>();
    auto* to = x.data_ptr<scalar_t>();
    const int64_t planes = channel_last ? 1 : channels;  // rows of work per image
    const int64_t inner = channel_last ? channels : 1;   // contiguous elements of a step
    at::parallel_for(0, batch * planes * length, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / (planes * length), c = i / length % planes, p = i % length;
        for (int64_t e = 0; e < inner; ++e) {
          acc_t total = 0;
          for (int64_t k = 0; k < kRoutes; ++k) {
            const int64_t l = step[k * length + p];
            total += static_cast<acc_t>(channel_last ? from[((b * length + l) * kRoutes + k) * channels + e]
                                                     : from[((b * kRoutes + k) * channels + c) * length + l]);
          }
          to[i * inner + e] = static_cast<scalar_t>(total);
        }
      }
    });
  });
  return x;
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("cross_scan", &mmvmamba::cross_scan);
  m.impl("cross_merge", &mmvmamba::cross_merge);
}

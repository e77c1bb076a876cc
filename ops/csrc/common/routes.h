// The routes of the scan modes: which pixel of a row-major map a route passes at each step.
#pragma once

#include <cstdint>

namespace mmvmamba {

constexpr int64_t kRoutes = 4;

// The pixel of route k at step l. Modes: cross2d, unidi, bidi, cascade2d.
inline int64_t route_pixel(int64_t mode, int64_t k, int64_t l, int64_t height, int64_t width) {
  // per mode and route: column-major, reversed
  static constexpr bool kColumn[4][4] = {{0, 1, 0, 1}, {0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 1, 1}};
  static constexpr bool kReverse[4][4] = {{0, 0, 1, 1}, {0, 0, 0, 0}, {0, 0, 1, 1}, {0, 1, 0, 1}};
  const int64_t step = kReverse[mode][k] ? height * width - 1 - l : l;
  return kColumn[mode][k] ? (step % height) * width + step / height : step;
}

}  // namespace mmvmamba

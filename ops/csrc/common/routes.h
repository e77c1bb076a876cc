// The routes of the scan modes: which pixel of a row-major map a route passes at each step. Neither torch nor CUDA is
// in here.
#pragma once

#include <cstdint>
#include <string_view>

namespace mmvmamba {

constexpr int kRoutes = 4;

// Which way the routes of a mode run; bit k of a mask is route k.
struct Routes {
  unsigned column, reverse;
};

// A mode's number is its place; ops/cross_scan/routes.py is the same table, which a test compares.
struct ScanMode {
  const char* name;
  Routes routes;
};
constexpr ScanMode kScanModes[] = {
    {"cross2d", {0b1010, 0b1100}},
    {"unidi", {0b0000, 0b0000}},
    {"bidi", {0b0000, 0b1100}},
    {"cascade2d", {0b1100, 0b1010}},
};
constexpr int kNumScanModes = sizeof(kScanModes) / sizeof(ScanMode);

constexpr bool is_scan_mode(int64_t mode) { return mode >= 0 && mode < kNumScanModes; }

// The number of a mode, or -1.
inline int find_scan_mode(std::string_view name) {
  for (int mode = 0; mode < kNumScanModes; ++mode) {
    if (name == kScanModes[mode].name) return mode;
  }
  return -1;
}

// The pixel of route k at step l.
inline int64_t route_pixel(int64_t mode, int64_t k, int64_t l, int64_t height, int64_t width) {
  const Routes& routes = kScanModes[mode].routes;
  const int64_t step = routes.reverse >> k & 1 ? height * width - 1 - l : l;
  return routes.column >> k & 1 ? (step % height) * width + step / height : step;
}

// The fused kernels take the routes of a mode in two pairs, (0, 2) and (1, 3), each over one order of pixels. That of
// the first pair is by rows, and the first route of a pair runs forwards.
constexpr bool second_is_reversed(const Routes& routes) { return routes.reverse >> 2 & 1; }  // route of each pair
constexpr bool second_is_by_column(const Routes& routes) { return routes.column >> 1 & 1; }  // pair
constexpr bool comes_in_pairs(const Routes& routes) {
  return routes.column == (second_is_by_column(routes) ? 0b1010 : 0b0000) &&
         routes.reverse == (second_is_reversed(routes) ? 0b1100 : 0b0000);
}

}  // namespace mmvmamba

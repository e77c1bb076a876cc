// The selective scan of a map, which each runtime's library calls: it knows neither torch nor a runtime.
//
//   x (B, H, W, D), projections (B, H, W, 4 (R + 2N)) in the order dt, B, C of each route, dt_weight (4, R, D),
//   dt_bias (4, D), A (4, N, D), skip (D), all float, and a scan mode -> y (B, H, W, D)
//
// A task owns a block of channels of one image, as in the op for torch, whose tile kernel this is; the threads of the
// runtime share the tasks. A number does not depend on how many there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/ceil_div.h"
#include "common/routes.h"
#include "ss2d/cpu_tile.h"

namespace mmvmamba {
namespace scan_map {

using namespace ss2d;

constexpr const char* kInputs[] = {"x", "projections", "dt_weight", "dt_bias", "A", "skip"};
constexpr size_t kInputCount = sizeof(kInputs) / sizeof(kInputs[0]);
constexpr size_t kRanks[] = {4, 4, 3, 2, 3, 1};

using Shape = std::vector<int64_t>;

inline int64_t numel(const Shape& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

inline std::string text(const Shape& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + ")";
}

// The number of a scan mode by name; `words` says what is wrong with one that has none here.
inline int find_mode(const std::string& name, std::string& words) {
  const int mode = find_scan_mode(name);
  if (mode >= 0 && comes_in_pairs(kScanModes[mode].routes)) return mode;
  words = "scan_mode is '" + name + "', expected cross2d, unidi or bidi";
  return -1;
}

// What is wrong with an input's number of dimensions, or nothing.
inline std::string rank_misfit(size_t index, const Shape& shape) {
  if (shape.size() == kRanks[index]) return "";
  return std::string(kInputs[index]) + " has shape " + text(shape) + ", expected " + std::to_string(kRanks[index]) +
         " dimensions";
}

// What is wrong with the shapes of the inputs, or nothing.
inline std::string misfit(const Shape (&shapes)[kInputCount]) {
  for (size_t i = 0; i < kInputCount; ++i) {
    const std::string words = rank_misfit(i, shapes[i]);
    if (!words.empty()) return words;
  }
  const Shape& x = shapes[0];
  const int64_t channels = x[3], rank = shapes[2][1], states = shapes[4][1];
  const Shape expected[] = {x,
                            {x[0], x[1], x[2], kRoutes * (rank + 2 * states)},
                            {kRoutes, rank, channels},
                            {kRoutes, channels},
                            {kRoutes, states, channels},
                            {channels}};
  constexpr const char* kLetters[] = {"", "(B, H, W, 4 (R + 2N))", "(4, R, D)", "(4, D)", "(4, N, D)", "(D)"};
  for (size_t i = 1; i < kInputCount; ++i) {
    if (shapes[i] != expected[i]) {
      return std::string(kInputs[i]) + " has shape " + text(shapes[i]) + ", expected " + kLetters[i] + " = " +
             text(expected[i]) + " for x of shape " + text(x);
    }
  }
  return "";
}

// Rows of `from` numbers as rows of `to`, those beyond zero.
inline std::vector<float> pad_rows(const float* data, int64_t rows, int64_t from, int64_t to) {
  std::vector<float> out(rows * to);
  for (int64_t row = 0; row < rows; ++row) std::copy(data + row * from, data + (row + 1) * from, &out[row * to]);
  return out;
}

// An input whose rows of channels are whole vectors: the runtime's memory, or a copy.
struct Padded {
  std::vector<float> own;
  const float* data;

  Padded(const float* given, const Shape& shape, int64_t padded) : data(given) {
    const int64_t channels = shape.back();
    if (channels == padded) return;
    own = pad_rows(given, numel(shape) / channels, channels, padded);
    data = own.data();
  }
};

// A scan cut into tasks. The inputs must fit (see misfit) and not be empty.
class MapScan {
 public:
  MapScan(int mode, const Shape (&shapes)[kInputCount], const float* const (&data)[kInputCount], float* y)
      : mode_(mode),
        batch_(shapes[0][0]),
        height_(shapes[0][1]),
        width_(shapes[0][2]),
        pixels_(height_ * width_),
        channels_(shapes[0][3]),
        padded_(ceil_div(channels_, kLanes) * kLanes),
        rank_(shapes[2][1]),
        states_(shapes[4][1]),
        columns_(rank_ + 2 * states_),
        x_(data[0], shapes[0], padded_),
        dt_weight_(data[2], shapes[2], padded_),
        bias_(data[3], shapes[3], padded_),
        A_(data[4], shapes[4], padded_),
        skip_(data[5], shapes[5], padded_),
        projections_(data[1]),
        own_(padded_ == channels_ ? 0 : batch_ * pixels_ * padded_),
        given_(y),
        y_(own_.empty() ? y : own_.data()) {
    // a channel's numbers do not depend on its block, so that few images are cut finer, for many threads
    const int64_t widest = batch_ * ceil_div(padded_, int64_t{kWidth}) < kFewTasks ? 4 * kLanes : kWidth;
    block_width_ = static_cast<int>(ceil_div(padded_ / kLanes, ceil_div(padded_, widest)) * kLanes);
    blocks_ = ceil_div(padded_, int64_t{block_width_});
  }
  MapScan(const MapScan&) = delete;

  int64_t tasks() const { return batch_ * blocks_; }

  // All routes over one block of channels of one image.
  void run(int64_t task) const {
    const int64_t image = task / blocks_, first = task % blocks_ * block_width_;
    const int own = static_cast<int>(std::min<int64_t>(block_width_, padded_ - first));
    const int64_t offset = image * pixels_ * padded_ + first;
    float* y = y_ + offset;
    skip_forward(pixels_, padded_, own, skip_.data + first, x_.data + offset, y);
    std::vector<float> h(states_ * padded_);
    int64_t pixel[kSteps];
    for (int64_t k = 0; k < kRoutes; ++k) {
      Block block{};
      block.channels = padded_, block.columns = kRoutes * columns_;
      block.rank = static_cast<int>(rank_), block.states = static_cast<int>(states_), block.width = own;
      block.dt_weight = dt_weight_.data + k * rank_ * padded_ + first;
      block.bias = bias_.data + k * padded_ + first;
      block.A = A_.data + k * states_ * padded_ + first;
      block.x = x_.data + offset;
      block.projections = projections_ + image * pixels_ * block.columns + k * columns_;
      std::fill(h.begin(), h.end(), 0.f);
      for (int64_t start = 0; start < pixels_; start += kSteps) {
        const int steps = static_cast<int>(std::min<int64_t>(kSteps, pixels_ - start));
        find_pixels(k, start, steps, pixel);
        forward_tile(block, pixel, steps, h.data(), y);
      }
    }
  }

  // Once, after all tasks.
  void finish() const {
    for (int64_t row = 0; !own_.empty() && row < batch_ * pixels_; ++row) {
      const float* from = own_.data() + row * padded_;
      std::copy(from, from + channels_, given_ + row * channels_);
    }
  }

 private:
  static constexpr int64_t kFewTasks = 8;

  // The pixels of `steps` steps of route k from step `start` on; like route_pixel, but with one division.
  void find_pixels(int64_t k, int64_t start, int steps, int64_t* pixel) const {
    const Routes& routes = kScanModes[mode_].routes;
    const bool reverse = routes.reverse >> k & 1;
    const int64_t first = reverse ? pixels_ - start - steps : start;  // the lowest step of the forward order
    if (routes.column >> k & 1) {
      int64_t row = first % height_, column = first / height_;
      for (int t = 0; t < steps; ++t) {
        pixel[t] = row * width_ + column;
        if (++row == height_) row = 0, ++column;
      }
    } else {
      for (int t = 0; t < steps; ++t) pixel[t] = first + t;
    }
    if (reverse) std::reverse(pixel, pixel + steps);
  }

  const int mode_;
  const int64_t batch_, height_, width_, pixels_, channels_, padded_, rank_, states_, columns_;
  const Padded x_, dt_weight_, bias_, A_, skip_;
  const float* const projections_;
  std::vector<float> own_;  // y with padded rows
  float* const given_;
  float* const y_;
  int block_width_;
  int64_t blocks_;
};

}  // namespace scan_map
}  // namespace mmvmamba

// The depthwise 3x3 convolution of channel-last maps with SiLU on CPU. No torch types in here.
//
// A row of a map lies in vectors of kVector channels, each of `width` + 2 pixels of which the first and the last are
// zero: (vectors, width + 2, kVector) floats, as every row that is padded here.
#pragma once

#include <cstdint>

#include "common/lanes.h"

namespace mmvmamba {
namespace depthwise {

constexpr int kTaps = 9;

struct Map {
  int64_t width, channels, vectors;
  const float* taps;  // (vectors, kTaps + 1, kVector), the bias behind the taps

  int64_t padded_row() const { return vectors * (width + 2) * kVector; }
};

// A row of pixels (width, channels) to a padded one, whose edges are left as they are.
template <typename T> void pad_row(const Map& map, const T* x, float* row);

// y (width, channels) = silu(z), z = taps * rows + bias.
template <typename T> void forward_row(const Map& map, const float* const* rows, T* y);

// dz, a padded row whose edges are left, from dy (width, channels); adds to the gradients of taps and bias, which lie
// as those do.
template <typename T>
void backward_row(const Map& map, const float* const* rows, const T* dy, float* dz, float* dtaps);

// dx (width, channels) from three padded rows of dz.
template <typename T> void input_row(const Map& map, const float* const* dz, T* dx);

}  // namespace depthwise
}  // namespace mmvmamba

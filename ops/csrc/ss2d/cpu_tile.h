// The fused SS2D core on one tile: up to kSteps pixels along a route, and a block of up to kWidth channels.
// Vectors are channels side by side; compiled for several instruction sets and chosen at load time.
#pragma once

#include <cstdint>

namespace mmvmamba {
namespace ss2d {

constexpr int kLanes = 8;   // numbers of a vector; rows of channels and of ranks are padded to a multiple
constexpr int kWidth = 64;  // most channels of a block
constexpr int kSteps = 32;  // pixels between two saved states

// A block of channels on one route. Pointers to parameters and pixels are at the block's first channel, those to
// projections at the route's first column.
struct Block {
  int64_t channels;  // padded: stride of the rows of x, y, dx and the parameters
  int64_t columns;   // stride of the rows of the projections
  int rank, states, width;
  const float* dt_weight;      // (rank, channels)
  const float* dt_transposed;  // (channels, padded rank), for backward
  const float* bias;           // (channels)
  const float* A;              // (states, channels), negative
  const float* x;              // (pixels, channels)
  const float* projections;    // (pixels, columns): dt, B, C
};

// What backward adds to; parameters as in Block.
struct Gradients {
  float* dt_weight;
  float* bias;
  float* A;
  float* dx;
  float* dprojections;
};

// y[p] = skip x[p] for the pixels of an image.
void skip_forward(int64_t pixels, int64_t channels, int width, const float* skip, const float* x, float* y);

// dx[p] = skip dy[p], dskip = sum of dy[p] x[p].
void skip_backward(int64_t pixels, int64_t channels, int width, const float* skip, const float* x, const float* dy,
                   float* dx, float* dskip);

// delta = softplus(dt_weight dt + bias), h = exp(delta A) h + delta B x, y += C h over the pixels in their order.
// h holds a row of `channels` for each state.
void forward_tile(const Block& block, const int64_t* pixel, int steps, float* h, float* y);

// The adjoint of forward_tile, from the last pixel to the first. h is the state before the tile. flow, a row of kWidth
// for each state, is the adjoint that comes in from behind, exp(delta A) g of the pixel after the tile, and is replaced
// by that of the tile's first pixel.
void backward_tile(const Block& block, const int64_t* pixel, int steps, const float* h, const float* dy, float* flow,
                   const Gradients& gradients);

}  // namespace ss2d
}  // namespace mmvmamba

// Launch interface of the selective-scan kernels. No torch types in here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/element_type.h"

namespace mmvmamba {
namespace scan {

constexpr int kSteps = 8;    // consecutive steps of one lane
constexpr int kChunk = 256;  // steps between two saved states: a warp's worth
constexpr int kShort = 64;   // rows up to this length share a warp, eight lanes each
constexpr int kMaxWarps = 8;

// Arguments of both directions; tensors are contiguous, null where absent. `pair` counts batch * groups.
struct Args {
  const void *u, *delta;   // (batch, dim, length) in the input type
  const float* A;          // (dim, d_state)
  const void *B, *C;       // (pairs, d_state, length) in the input type
  const float *D, *bias;   // (dim)
  void* out;               // (batch, dim, length), the input type or float
  float* states;           // (batch, dim, chunks + 1, d_state): the state before each chunk, and the last
  const void* dout;        // backward: like out
  void *du, *ddelta;       // backward: (batch, dim, length) in the input type
  float *dA, *dD, *dbias;  // backward: (batch, dim, d_state), (batch, dim), (batch, dim)
  float* partial;          // backward: (splits, 2, pairs, d_state, length): dB and dC of a block's channels
  int64_t pairs;
  int groups, channels, d_state, length, chunks;  // channels: of one group
  int warps, turns, splits;  // a block has `warps` warps, each with `turns` channels (or sets of them)
  int vector, float_vector;  // bytes that a row of the input type, or of float, can be accessed by at a time
  bool softplus, float_out;
};

inline bool short_rows(const Args& p) { return p.d_state == 1 && p.length <= kShort; }
inline int slots(const Args& p) { return short_rows(p) ? 4 : 1; }  // channels that a warp scans at a time

void launch_forward(Type type, const Args& args, cudaStream_t stream);
void launch_backward(Type type, const Args& args, cudaStream_t stream);

// dB and dC, (pairs, d_state, length) in the input type, from the partial sums of backward, added in their order.
void launch_add_partial(Type type, const Args& args, void* dB, void* dC, cudaStream_t stream);

// The kernels of an element type, instantiated in a file of its own.
template <typename T> struct Kernels {
  static void forward(const Args& args, cudaStream_t stream);
  static void backward(const Args& args, cudaStream_t stream);
  static void add_partial(const Args& args, void* dB, void* dC, cudaStream_t stream);
};

}  // namespace scan
}  // namespace mmvmamba

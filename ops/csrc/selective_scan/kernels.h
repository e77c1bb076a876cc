// Launch interface of the selective-scan kernels. No torch types in here.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace mmvmamba {
namespace scan {

constexpr int kSteps = 8;       // consecutive steps of one lane
constexpr int kChunk = 256;     // steps between two saved states: a warp's worth
constexpr int kShort = 64;      // rows up to this length share a warp, eight lanes each
constexpr int kMaxWarps = 8;

enum class Type { kHalf, kBfloat16, kFloat };

// Arguments of both directions; tensors are contiguous, null where absent. `pair` counts batch * groups.
struct Args {
  const void *u, *delta;               // (batch, dim, length) in the input type
  const float* A;                      // (dim, states)
  const void *B, *C;                   // (pairs, states, length) in the input type
  const float *D, *bias;               // (dim)
  void* out;                           // (batch, dim, length), the input type or float
  float* carries;                      // (batch, dim, chunks + 1, states): the state before each chunk, and the last
  const void* dout;                    // backward: like out
  void *du, *ddelta;                   // backward: (batch, dim, length) in the input type
  float *dA, *dD, *dbias;              // backward: (batch, dim, states), (batch, dim), (batch, dim)
  float* partial;                      // backward: (splits, 2, pairs, states, length): dB and dC of a block's channels
  int64_t pairs;
  int groups, channels, states, length, chunks;  // channels: of one group
  int warps, turns, splits;            // a block has `warps` warps, each with `turns` channels (or sets of them)
  int vector, float_vector;            // bytes that a row of the input type, or of float, can be accessed by at a time
  bool softplus, float_out;
};

inline bool short_rows(const Args& p) { return p.states == 1 && p.length <= kShort; }
inline int slots(const Args& p) { return short_rows(p) ? 4 : 1; }  // channels that a warp scans at a time

void launch_forward(Type type, const Args& args, cudaStream_t stream);
void launch_backward(Type type, const Args& args, cudaStream_t stream);

// dB and dC, (pairs, states, length) in the input type, from the partial sums of backward, added in their order.
void launch_add_partial(Type type, const Args& args, void* dB, void* dC, cudaStream_t stream);

// One instantiation file a type.
#define MMVMAMBA_SCAN_DECLARE(suffix)                                  \
  void forward_##suffix(const Args& args, cudaStream_t stream);        \
  void backward_##suffix(const Args& args, cudaStream_t stream);       \
  void add_partial_##suffix(const Args& args, void* dB, void* dC, cudaStream_t stream);
MMVMAMBA_SCAN_DECLARE(half)
MMVMAMBA_SCAN_DECLARE(bfloat16)
MMVMAMBA_SCAN_DECLARE(float)
#undef MMVMAMBA_SCAN_DECLARE

}  // namespace scan
}  // namespace mmvmamba

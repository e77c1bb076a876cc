// Launch interface of the fused SS2D kernels (see ss2d/common.cuh for the vocabulary). No torch types in here but one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/divisor.h"
#include "common/element_type.h"
#include "ss2d/layout.h"

namespace mmvmamba {
namespace ss2d {

// Segments a block can hold, and a forward block that is an image: of these, two fit a processor.
constexpr int kMaxWarps = 8;
constexpr int kMaxImageWarps = 14;
// Those of a chain hold at most: 7 for rank 12, so that two blocks fit into the shared memory of an H100.
constexpr int max_warps(int rank) { return rank == 12 ? 7 : kMaxWarps; }

// How a block of a chain learns the state that enters it.
enum class Chain {
  kNone,      // the image is one block
  kLookBack,  // blocks publish their carries and wait for those before them; a chain must be resident as a whole
  kPrefix,    // block_carries holds the entering states, by the carries kernel and launch_combine
};

// Arguments of a scan kernel. `q` = 2 * pair + route of pair; padded = channels rounded up to 32.
struct Args {
  const void* x;             // (batch, length, channels)
  const void* dy;            // (batch, length, channels), backward only
  const void* projections;   // (batch, length, 4, projection_columns): dt, zeros, B, C of each q
  void* u;                   // (batch, length, 4, channels), rank 0 only: float's dt projected; backward leaves du2
  const float* dt_weight;    // (4, rank, padded), float only
  const void* dt_operand;    // (4, groups) operands of the tensor cores, 16-bit types only; see projections.cuh
  const void* dt_fragment;   // (4, columns, padded) in the type of x, backward only
  const float* bias;         // (4, padded)
  const float* A;            // (4, padded), negative
  const float* skip;         // (padded): sum of D over the routes
  void* y;                   // (batch, length, channels): output, or dx in backward
  void* block_carries;       // (batch, chain, 2, padded) pairs of float; all bits set before a look-back
  float* states;             // (batch, segments, 4, channels): state entering each segment, or null
  void* dprojections;        // (batch, length, 4, projection_columns), backward only
  float* dprojections_part;  // (splits, batch, length, 4, 2): dB and dC, backward of rank 0
  float* partial;            // (batch * chain, groups, outputs): sums over a block's pixels
  int64_t batch;
  int channels, padded, groups, height, width, length, segments, chain, projection_columns;
  Divisor by_height, by_chain, by_groups, by_splits, by_warps;
  Divisor by_parts;  // of 16 bytes, that the projections of a pair have in a pixel, 16-bit types only
  Chain chaining;
  int pair;
  int splits;            // parts the channel groups are split into, backward only
  bool column_order;     // steps go down the columns
  bool second_reversed;  // the pair's second route runs backwards
  bool float_output;     // y is float whatever the type of x
};

// Floats a block leaves for each group: weight sums of two routes, then dA of two routes and dD.
template <int Rank> constexpr int kPartialColumns = Rank == 0 ? 1 : Rank <= 6 ? 8 : 16;
template <int Rank> constexpr int kPartialSize = 32 * (2 * kPartialColumns<Rank> + 3);
inline int partial_columns(int rank) {
  return rank == 0 ? kPartialColumns<0> : rank == 6 ? kPartialColumns<6> : kPartialColumns<12>;
}
inline int partial_size(int rank) { return 32 * (2 * partial_columns(rank) + 3); }

// rank: 6 or 12 (dt ranks up to those, zero padded), or 0 (any).
void launch_forward_carries(Type type, int rank, int warps, const Args& args, cudaStream_t stream);
void launch_forward(Type type, int rank, int warps, const Args& args, cudaStream_t stream);
void launch_backward_carries(Type type, int rank, int warps, const Args& args, cudaStream_t stream);
void launch_backward(Type type, int rank, int warps, const Args& args, cudaStream_t stream);

// Shared memory that a block of `warps` segments needs, for the projection_columns and chaining of args: a forward of
// Chain::kNone is a block an image.
int shared_bytes(Type type, int rank, int warps, bool backward, const Args& args);

// From the carries of a chain's blocks to the states that enter them, in place; a flag a route of the pair for the
// direction.
void launch_combine(const Args& args, bool first_reversed, bool second_reversed, cudaStream_t stream);

// The kernels of an element type, each struct instantiated in a file of its own.
template <typename T> struct Forward {
  static void run_carries(int rank, int warps, const Args& args, cudaStream_t stream);
  static void run(int rank, int warps, const Args& args, cudaStream_t stream);
  static int shared_bytes(int rank, int warps, const Args& args);
};
template <typename T> struct Backward {
  static void run_carries(int rank, int warps, const Args& args, cudaStream_t stream);
  static void run(int rank, int warps, const Args& args, cudaStream_t stream);
  static int shared_bytes(int rank, int warps, const Args& args);
};

// Parameters as the kernels and GEMMs want them, all routes in q order.
struct Prepare {
  const float *x_proj, *dt_proj, *dt_bias, *A_logs, *Ds;  // the op's parameters in float
  void* weight;       // (4, projection_columns, channels): rows dt, zeros, ln2 * B, C
  float* dt_weight;   // (4, rank, padded)
  void* dt_operand;   // as in Args, or null
  void* dt_fragment;  // (4, columns, padded), or null
  void* dt_matrix;    // (4, projection_columns, channels): log2e * Wdt^T, zero in the other rows; or null
  float *bias, *A, *skip;
  uint2* carries;  // block carries to mark as not yet published
  int64_t num_carries;
  int channels, padded, dt_rank, rank, projection_columns;
  Divisor by_padded, by_columns;
};
void launch_prepare(Type type, const Prepare& args, cudaStream_t stream);

// Gradients of the parameters from the partial sums, of blocks and of GEMMs.
struct Finish {
  const float* partial;  // (2, blocks, groups, outputs), the pairs one after the other
  const void* dweight;   // (weight_parts, 4, projection_columns, channels): their sum is dprojections^T x
  const void*
      ddt_matrix;  // (matrix_parts, 4 * projection_columns, 4 * channels): of projections^T du2; null unless rank = 0
  const float* A;  // (4, padded)
  float *dx_proj, *ddt_proj, *ddt_bias, *dA_logs, *dDs;
  int blocks, weight_parts, matrix_parts;
  int channels, padded, groups, dt_rank, rank, projection_columns;
  Divisor by_channels, by_columns;
};
void launch_finish(Type type, const Finish& args, cudaStream_t stream);

// dprojections[..., B and C] = sum over splits of dprojections_part.
void launch_add_parts(Type type, const Args& args, cudaStream_t stream);

}  // namespace ss2d
}  // namespace mmvmamba

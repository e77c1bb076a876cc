// Launch interface of the fused SS2D kernels for several states a channel (vocabulary in states/warp.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/element_type.h"
#include "ss2d/states/layout.h"

namespace mmvmamba {
namespace ss2d {
namespace states {

// Arguments of a scan kernel. `q` = 2 * pair + route of pair; padded = channels rounded up to 32; N padded as well.
struct Args {
  const void* x;            // (batch, length, channels)
  const void* dy;           // (batch, length, channels), backward only
  const void* projections;  // (batch, length, 4, columns): dt, zeros, B, C of each q, zeros
  const void* u;            // (batch, length, 4, channels): dt projected, without bias; null: the kernels project it
  const float* dt_weight;   // (4, dt_columns, padded), zeros beyond the rank
  const float* bias;        // (4, padded)
  const float* A;           // (4, N, padded), negative
  const float* skip;        // (padded): sum of D over the routes
  void* y;                  // (batch, length, channels): output, or dx in backward
  float* states;            // (batch, segments, 4, groups, N * 32): entering each segment, or null
  float* carries;           // (batch, chain, 2, groups, N * 32): ends of blocks, then what enters them; null: one block
  float* sums;              // (batch, chain, 2, padded): of d2 over a block
  void* du;                 // (batch, length, 4, channels), backward only
  void* dprojections;       // (batch, length, 4, columns), backward only: B, C and the zeros after them
  float* parts;             // (splits, batch, length, 4, 2N): dB and dC, if blocks have not all channels; else null
  float* partial;           // (batch * chain, 2, N + 2, padded): dA, dbias and dD, sums over a block's pixels
  int64_t batch;
  int channels, padded, groups, height, width, length, segments, rank, dt_columns, columns;
  int chain, chunk;          // blocks of an image, and segments of a block
  int splits, block_groups;  // blocks that the groups are split over, and groups of a block, backward only
  int pair;
  bool column_order;     // steps go down the columns
  bool second_reversed;  // the pair's second route runs backwards
  bool float_output;     // y is float whatever the type of x
};

// Parameters as the kernels and GEMMs want them, all routes in q order.
struct Prepare {
  const float *x_proj, *dt_proj, *dt_bias, *A_logs, *Ds;  // the op's parameters in float
  void* weight;                                           // (4, columns, channels): rows dt, zeros, ln2 * B, C, zeros
  void* dt_matrix;                                        // (4, dt_columns, channels): log2e * Wdt^T
  float* dt_weight;                                       // (4, rank, padded): the same in float
  float *bias, *A, *skip;
  int channels, padded, rank, dt_columns, columns, states, padded_states;
};

// Gradients of the parameters from the partial sums, of blocks and of GEMMs.
struct Finish {
  const float* partial;  // (2, rows, 2, N + 2, padded), the pairs one after the other
  const void* dweight;   // (weight_parts, 4, columns, channels): their sum is dprojections^T x
  const void* ddt;       // (4, matrix_parts, dt_columns, channels): their sum is dt^T du2
  const float* A;        // (4, N, padded)
  float *dx_proj, *ddt_proj, *ddt_bias, *dA_logs, *dDs;
  int64_t rows;
  int weight_parts, matrix_parts;
  int channels, padded, rank, dt_columns, columns, states, padded_states;
};

void launch_prepare(Type type, const Prepare& args, cudaStream_t stream);
void launch_finish(Type type, const Finish& args, cudaStream_t stream);
// dprojections[..., B, C and zeros] = sum over splits of parts.
void launch_add_parts(Type type, int states, const Args& args, cudaStream_t stream);

void launch_forward(Type type, int states, const Args& args, cudaStream_t stream);
void launch_backward(Type type, int states, const Args& args, cudaStream_t stream);
// Carries of blocks, of h or of s, then what enters the blocks in their place. Nothing if an image is one block.
void launch_forward_carries(Type type, int states, const Args& args, cudaStream_t stream);
void launch_backward_carries(Type type, int states, const Args& args, cudaStream_t stream);

// The kernels of an element type, each struct instantiated in a file of its own.
template <typename T> struct Kernels {
  static void run_forward(int states, const Args& args, cudaStream_t stream);
  static void run_forward_carries(int states, const Args& args, cudaStream_t stream);
};
template <typename T> struct BackwardKernels {
  static void run_backward(int states, const Args& args, cudaStream_t stream);
  static void run_backward_carries(int states, const Args& args, cudaStream_t stream);
};

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

// Forward scan kernels of the fused SS2D core, N = 1.
//
// forward_kernel: a block takes 32 channels and S segments of one image, both routes of a pair. A thread scans its
//   channel's segment of kSegment pixels twice (once a route) from a zero state, in registers: y is the sum of C h,
//   and C * (product of decays) is kept, because y is affine in the entering state. The segments' carries meet in
//   shared memory, those of the chain's blocks in global memory; then y += C prod * state, and y is written once (the
//   second pair reads the first pair's y and adds).
//   Moves: x once, maps once a group (shared through L2), y once (twice for the second pair), states if training.
// forward_carries_kernel: the same local scan without outputs; a block leaves one carry a route and channel. For chains
//   too long to wait for.
#pragma once

#include "ss2d_maps.cuh"

namespace mmvmamba {
namespace ss2d {

// Scan one segment of one route from a zero state. A is that of the channel.
template <typename T, int Rank, bool Reversed, bool Output>
__device__ __forceinline__ Carry scan_segment(const Maps<T, Rank>& maps, int route, const Projected<T, Rank>& u,
                                              const Values<T>& x, float A, float (&y)[kSegment], Values<T>& through) {
  Carry carry = {1.f, 0.f};
  float previous = 0.f;
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? kSegment - 1 - i : i;
    const float2 bc = maps.bc(route, t);
    const float d2 = softplus2<T>(u[t]);
    const float decay = exp2_fast(A * d2);
    carry.end = fmaf(decay, carry.end, d2 * x[t] * bc.x);
    carry.product *= decay;
    if constexpr (Output) {
      y[t] = fmaf(bc.y, carry.end, y[t]);
      const float gain = bc.y * carry.product;
      if (i % 2) through.set_pair(t & ~1, Reversed ? gain : previous, Reversed ? previous : gain);
      previous = gain;
    }
  }
  return carry;
}

// What the first pair of routes has left in y.
template <typename T>
__device__ __forceinline__ void load_output(const Args& p, int64_t image, int first, float (&y)[kSegment]) {
  if (p.float_output) {
    const Values<float> before = load_segment(p, static_cast<const float*>(p.y) + image, first, p.channels);
#pragma unroll
    for (int t = 0; t < kSegment; ++t) y[t] = before[t];
  } else {
    const Values<T> before = load_segment(p, static_cast<const T*>(p.y) + image, first, p.channels);
#pragma unroll
    for (int t = 0; t < kSegment; ++t) y[t] = before[t];
  }
}

template <typename T, int Rank, bool SecondReversed, bool Output>
__device__ __forceinline__ void forward_body(const Args& p, char* shared) {
  Place at(p, blockIdx.x % p.chain, blockIdx.x / (p.groups * p.chain));
  at.select_group(p, blockIdx.x / p.chain % p.groups);
  const int lane = at.lane, warp = at.warp, warps = at.warps;
  Carry* local = reinterpret_cast<Carry*>(shared);  // [2][warps][32]
  Carry* before = local + 2 * warps * 32;           // the same, if chained
  shared += 4 * warps * 32 * sizeof(Carry) + warp * (Maps<T, Rank>::bytes(p.map_columns) + Projected<T, Rank>::kTileBytes);
  const Maps<T, Rank> maps(p, shared);
  float* tile = reinterpret_cast<float*>(shared + Maps<T, Rank>::bytes(p.map_columns));

  maps.load(p, at);
  const int64_t image = at.batch * p.length * p.channels + at.channel;
  const Values<T> x = load_segment(p, static_cast<const T*>(p.x) + image, at.first, p.channels);
  float y[kSegment];
  if (Output && p.pair == 1) load_output<T>(p, image, at.first, y);
  maps.wait(p, lane);
  if (Output && p.pair == 0) {
    const float skip = p.skip[at.padded_channel];
#pragma unroll
    for (int t = 0; t < kSegment; ++t) y[t] = skip * x[t];
  }

  const float* A = p.A + 2 * p.pair * p.padded + at.padded_channel;
  Values<T> through0, through1;
  {
    const Projected<T, Rank> u(p, at, maps, tile, 0);
    local[warp * 32 + lane] = scan_segment<T, Rank, false, Output>(maps, 0, u, x, A[0], y, through0);
  }
  {
    const Projected<T, Rank> u(p, at, maps, tile, 1);
    local[(warps + warp) * 32 + lane] =
        scan_segment<T, Rank, SecondReversed, Output>(maps, 1, u, x, A[p.padded], y, through1);
  }
  __syncthreads();
  if (!Output || p.chaining == Chain::kLookBack) {
    for (int route = warp; route < 2; route += warps) {
      publish(block_carry(p, at.batch, at.block, route, at.padded_channel),
              block_total(local + route * warps * 32, route == 1 && SecondReversed, warps, lane));
    }
  }
  if constexpr (!Output) return;
  const bool chained = p.chaining != Chain::kNone;
  if (chained) {
    before[warp * 32 + lane] = share_of_chain(p, at.batch, at.block, 0, at.padded_channel, false, warp, warps);
    before[(warps + warp) * 32 + lane] =
        share_of_chain(p, at.batch, at.block, 1, at.padded_channel, SecondReversed, warp, warps);
    __syncthreads();
  }
  const float state0 = incoming(local, before, chained, false, warp, warps, lane);
  const float state1 =
      incoming(local + warps * 32, before + warps * 32, chained, SecondReversed, warp, warps, lane);
  if (!at.active || at.count == 0) return;
  if (p.states != nullptr) {
    const int64_t segment = at.batch * p.segments + at.block * warps + warp;
    float* to = p.states + (segment * 4 + 2 * p.pair) * p.channels + at.channel;
    to[0] = state0;
    to[p.channels] = state1;
  }
#pragma unroll
  for (int t = 0; t < kSegment; ++t) y[t] = fmaf(through1[t], state1, fmaf(through0[t], state0, y[t]));
  if (p.float_output) {
    store_segment(p, static_cast<float*>(p.y) + image, at.first, at.count, y);
  } else {
    store_segment(p, static_cast<T*>(p.y) + image, at.first, at.count, y);
  }
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32, sizeof(T) == 2 ? 3 : 2)
    forward_kernel(const __grid_constant__ Args p) {
  extern __shared__ float4 shared[];
  forward_body<T, Rank, SecondReversed, true>(p, reinterpret_cast<char*>(shared));
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32) forward_carries_kernel(const __grid_constant__ Args p) {
  extern __shared__ float4 shared[];
  forward_body<T, Rank, SecondReversed, false>(p, reinterpret_cast<char*>(shared));
}

template <typename T, int Rank> int forward_shared(const Args& args, int warps) {
  return warps * (4 * 32 * sizeof(Carry) + Maps<T, Rank>::bytes(args.map_columns) + Projected<T, Rank>::kTileBytes);
}

// Launch `kernel` with a dynamic shared memory that may exceed the default limit.
inline void launch(void (*kernel)(const Args), int64_t blocks, int warps, int bytes, const Args& args,
                   cudaStream_t stream) {
  if (bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<static_cast<unsigned>(blocks), warps * 32, bytes, stream>>>(args);
}

template <typename T, int Rank> void run_forward(bool carries, int warps, const Args& args, cudaStream_t stream) {
  const int64_t blocks = args.batch * args.chain * args.groups;
  const int bytes = forward_shared<T, Rank>(args, warps);
  if (carries) {
    launch(args.second_reversed ? forward_carries_kernel<T, Rank, true> : forward_carries_kernel<T, Rank, false>,
           blocks, warps, bytes, args, stream);
  } else {
    launch(args.second_reversed ? forward_kernel<T, Rank, true> : forward_kernel<T, Rank, false>, blocks, warps, bytes,
           args, stream);
  }
}

}  // namespace ss2d
}  // namespace mmvmamba

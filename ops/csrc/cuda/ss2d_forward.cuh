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

#include "ss2d_common.cuh"

namespace mmvmamba {
namespace ss2d {

// Scan one segment of one route from a zero state. weight/bias/A of the channel; `maps` staged rows of the segment.
template <typename T, int Rank, bool Reversed, bool Output>
__device__ __forceinline__ Carry scan_segment(const float* maps, const Values<T>& x, const Projected<T, Rank>& u,
                                              const float (&weight)[Rank ? Rank : 1], float bias, float A,
                                              float (&y)[kSegment], Values<T>& through) {
  constexpr int columns = Maps<Rank>::kColumns;
  Carry carry = {1.f, 0.f};
  float previous = 0.f;
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? kSegment - 1 - i : i;
    const float* row = maps + t * columns;
    const float2 bc = *reinterpret_cast<const float2*>(row + Maps<Rank>::kB);
    const float d2 = softplus2<T>(Rank ? project_dt<Rank>(row, weight, bias) : bias + u[t]);
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
__device__ __forceinline__ void forward_body(const Args& p, float* maps) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int block = blockIdx.x % p.chain, group = blockIdx.x / p.chain % p.groups;
  const int64_t batch = blockIdx.x / (p.groups * p.chain);
  const int padded_channel = group * 32 + lane;
  const bool active = padded_channel < p.channels;
  const int channel = active ? padded_channel : p.channels - 1;
  const int segment = block * warps + warp, first = segment * kSegment;
  const int count = max(0, min(kSegment, p.length - first));
  const int steps = warps * kSegment;
  Carry* local = reinterpret_cast<Carry*>(maps + 2 * steps * Maps<Rank>::kColumns);  // [2][warps][32]
  Carry* before = local + 2 * warps * 32;                                            // the same, if chained

  const int64_t image = batch * p.length * p.channels + channel;
  Staging<T, Rank> staging;
  staging.load(p, batch, block * steps);
  const Values<T> x = load_segment(p, static_cast<const T*>(p.x) + image, first, p.channels);
  float y[kSegment];
  if (Output && p.pair == 1) load_output<T>(p, image, first, y);
  Projected<T, Rank> u0, u1;
  u0.load(p, batch, first, 2 * p.pair, channel);
  u1.load(p, batch, first, 2 * p.pair + 1, channel);
  staging.store(maps, steps);
  if (Output && p.pair == 0) {
    const float skip = p.skip[padded_channel];
#pragma unroll
    for (int t = 0; t < kSegment; ++t) y[t] = skip * x[t];
  }
  __syncthreads();

  Values<T> through0, through1;
  float weight[Rank ? Rank : 1];
  const float* rows = maps + warp * kSegment * Maps<Rank>::kColumns;
  {
    const int q = 2 * p.pair;
    load_weight<Rank>(p, q, padded_channel, weight);
    local[warp * 32 + lane] =
        scan_segment<T, Rank, false, Output>(rows, x, u0, weight, p.bias[q * p.padded + padded_channel],
                                             p.A[q * p.padded + padded_channel], y, through0);
  }
  {
    const int q = 2 * p.pair + 1;
    load_weight<Rank>(p, q, padded_channel, weight);
    local[(warps + warp) * 32 + lane] = scan_segment<T, Rank, SecondReversed, Output>(
        rows + steps * Maps<Rank>::kColumns, x, u1, weight, p.bias[q * p.padded + padded_channel],
        p.A[q * p.padded + padded_channel], y, through1);
  }
  __syncthreads();
  if (!Output || p.chaining == Chain::kLookBack) {
    for (int route = warp; route < 2; route += warps) {
      publish(block_carry(p, batch, block, route, padded_channel),
              block_total(local + route * warps * 32, route == 1 && SecondReversed, warps, lane));
    }
  }
  if constexpr (!Output) return;
  const bool chained = p.chaining != Chain::kNone;
  if (chained) {
    before[warp * 32 + lane] = share_of_chain(p, batch, block, 0, padded_channel, false, warp, warps);
    before[(warps + warp) * 32 + lane] =
        share_of_chain(p, batch, block, 1, padded_channel, SecondReversed, warp, warps);
    __syncthreads();
  }
  const float state0 = incoming(local, before, chained, false, warp, warps, lane);
  const float state1 =
      incoming(local + warps * 32, before + warps * 32, chained, SecondReversed, warp, warps, lane);
  if (!active || count == 0) return;
  if (p.states != nullptr) {
    float* to = p.states + ((batch * p.segments + segment) * 4 + 2 * p.pair) * p.channels + channel;
    to[0] = state0;
    to[p.channels] = state1;
  }
#pragma unroll
  for (int t = 0; t < kSegment; ++t) y[t] = fmaf(through1[t], state1, fmaf(through0[t], state0, y[t]));
  if (p.float_output) {
    store_segment(p, static_cast<float*>(p.y) + image, first, count, y);
  } else {
    store_segment(p, static_cast<T*>(p.y) + image, first, count, y);
  }
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32, sizeof(T) == 2 ? 3 : 2)
    forward_kernel(const __grid_constant__ Args p) {
  extern __shared__ float4 shared[];
  forward_body<T, Rank, SecondReversed, true>(p, reinterpret_cast<float*>(shared));
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32) forward_carries_kernel(const __grid_constant__ Args p) {
  extern __shared__ float4 shared[];
  forward_body<T, Rank, SecondReversed, false>(p, reinterpret_cast<float*>(shared));
}

template <int Rank> int forward_shared(int warps) {
  return warps * (2 * kSegment * Maps<Rank>::kColumns * sizeof(float) + 4 * 32 * sizeof(Carry));
}

// Launch `kernel` with a dynamic shared memory that may exceed the default limit.
inline void launch(void (*kernel)(const Args), int64_t blocks, int warps, int bytes, const Args& args,
                   cudaStream_t stream) {
  if (bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<static_cast<unsigned>(blocks), warps * 32, bytes, stream>>>(args);
}

template <typename T, int Rank> void run_forward(bool carries, int warps, const Args& args, cudaStream_t stream) {
  const int64_t blocks = args.batch * args.chain * args.groups;
  const int bytes = forward_shared<Rank>(warps);
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

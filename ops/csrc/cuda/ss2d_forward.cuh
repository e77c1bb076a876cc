// Forward scan kernels of the fused SS2D core, N = 1.
//
// forward_kernel: a block takes 32 channels and S segments of one image, both routes of a pair. A thread scans its
//   channel's segment of kSegment pixels twice (once a route) from a zero state, in registers: y is the sum of C h,
//   and C * (product of decays) is kept, because y is affine in the entering state. The segments' carries meet in
//   shared memory, the blocks' carries come from forward_carries_kernel; then y += C prod * state, and y is written
//   once (the second pair reads the first pair's y and adds).
//   Moves: x once, maps once a group (shared through L2), y once (twice for the second pair), states if training.
// forward_carries_kernel: the same local scan without outputs; a block leaves one carry a route and channel.
#pragma once

#include "ss2d_common.cuh"

namespace mmvmamba {
namespace ss2d {

// Scan one segment of one route from a zero state. weight/bias/A of the channel; `maps` staged rows of the segment.
template <typename T, int Rank, bool Reversed, bool Output>
__device__ __forceinline__ Carry scan_segment(const float* maps, const float (&x)[kSegment], const T (&u)[kSegment],
                                              const float (&weight)[Rank ? Rank : 1], float bias, float A,
                                              float (&y)[kSegment], float (&through)[kSegment]) {
  constexpr int columns = Maps<Rank>::kColumns;
  Carry carry = {1.f, 0.f};
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? kSegment - 1 - i : i;
    const float* row = maps + t * columns;
    const float2 bc = *reinterpret_cast<const float2*>(row + Maps<Rank>::kB);
    const float d2 = softplus2<T>(Rank ? project_dt<Rank>(row, weight, bias) : bias + to_float(u[t]));
    const float decay = exp2_fast(A * d2);
    carry.end = fmaf(decay, carry.end, d2 * x[t] * bc.x);
    carry.product *= decay;
    if constexpr (Output) {
      y[t] = fmaf(bc.y, carry.end, y[t]);
      through[t] = bc.y * carry.product;
    }
  }
  return carry;
}

template <typename T, int Rank>
__device__ __forceinline__ void load_u(const Args& p, int64_t batch, int first, int count, int q, int channel,
                                       T (&u)[kSegment]) {
  if constexpr (Rank == 0) {
    const T* from = static_cast<const T*>(p.u) + (batch * p.length * 4 + q) * p.channels + channel;
    Walk walk(p, min(first, p.length - 1));
#pragma unroll
    for (int t = 0; t < kSegment; ++t) {
      u[t] = t < count ? from[static_cast<int64_t>(walk.pixel) * 4 * p.channels] : from_float<T>(0.f);
      walk.next(p);
    }
  }
}

template <typename T, int Rank, bool SecondReversed, bool Output>
__device__ __forceinline__ void forward_body(const Args& p, float* maps) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int group = blockIdx.x % p.groups, block = blockIdx.x / p.groups % p.chain;
  const int64_t batch = blockIdx.x / (p.groups * p.chain);
  const int padded_channel = group * 32 + lane;
  const bool active = padded_channel < p.channels;
  const int channel = active ? padded_channel : p.channels - 1;
  const int segment = block * warps + warp, first = segment * kSegment;
  const int count = max(0, min(kSegment, p.length - first));
  const int steps = warps * kSegment;
  Carry* local = reinterpret_cast<Carry*>(maps + 2 * steps * Maps<Rank>::kColumns);  // [2][warps][32]
  Carry* before = local + 2 * warps * 32;                                            // the same, if chained

  const T* x_from = static_cast<const T*>(p.x) + batch * p.length * p.channels + channel;
  float x[kSegment], y[kSegment];
  {
    T raw[kSegment];
    Walk walk(p, min(first, p.length - 1));
#pragma unroll
    for (int t = 0; t < kSegment; ++t) {
      raw[t] = t < count ? x_from[walk.pixel * p.channels] : from_float<T>(0.f);
      walk.next(p);
    }
    if (Output && p.pair == 1) {
      Walk back(p, min(first, p.length - 1));
      const int64_t offset = batch * p.length * p.channels + channel;
#pragma unroll
      for (int t = 0; t < kSegment; ++t) {
        y[t] = 0.f;
        if (t < count) {
          const int64_t at = offset + back.pixel * p.channels;
          y[t] = p.float_output ? static_cast<const float*>(p.y)[at] : to_float(static_cast<const T*>(p.y)[at]);
        }
        back.next(p);
      }
    }
#pragma unroll
    for (int t = 0; t < kSegment; ++t) x[t] = to_float(raw[t]);
  }
  T u0[kSegment], u1[kSegment];
  load_u<T, Rank>(p, batch, first, count, 2 * p.pair, channel, u0);
  load_u<T, Rank>(p, batch, first, count, 2 * p.pair + 1, channel, u1);
  if (Output && p.pair == 0) {
    const float skip = p.skip[padded_channel];
#pragma unroll
    for (int t = 0; t < kSegment; ++t) y[t] = skip * x[t];
  }
  stage_maps<T, Rank>(p, batch, block * steps, steps, maps);
  __syncthreads();

  float through0[kSegment], through1[kSegment];
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
  const bool chained = Output && p.chain > 1;
  if (chained) {
    before[warp * 32 + lane] = share_of_chain(p, batch, block, 0, padded_channel, false, warp, warps);
    before[(warps + warp) * 32 + lane] =
        share_of_chain(p, batch, block, 1, padded_channel, SecondReversed, warp, warps);
  }
  __syncthreads();

  if constexpr (!Output) {
    for (int route = warp; route < 2; route += warps) {
      Carry carry = {1.f, 0.f};
      for (int w = 0; w < warps; ++w) {
        append(carry, local[(route * warps + (route == 1 && SecondReversed ? warps - 1 - w : w)) * 32 + lane]);
      }
      static_cast<Carry*>(p.block_carries)[carry_index(p, batch, block, route) + padded_channel] = carry;
    }
    return;
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
  Walk walk(p, first);
  const int64_t offset = batch * p.length * p.channels + channel;
#pragma unroll
  for (int t = 0; t < kSegment; ++t) {
    if (t < count) {
      const float value = fmaf(through1[t], state1, fmaf(through0[t], state0, y[t]));
      const int64_t at = offset + walk.pixel * p.channels;
      if (p.float_output) {
        static_cast<float*>(p.y)[at] = value;
      } else {
        static_cast<T*>(p.y)[at] = from_float<T>(value);
      }
      walk.next(p);
    }
  }
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32) forward_kernel(const __grid_constant__ Args p) {
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

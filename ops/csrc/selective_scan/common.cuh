// What both directions of the selective scan share: eight consecutive steps in registers, softplus, warp scans.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "selective_scan/kernels.h"

namespace mmvmamba {
namespace scan {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kLog2e = 1.44269504088896341f;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void from_float(float v, float& to) { to = v; }
__device__ inline void from_float(float v, __half& to) { to = __float2half_rn(v); }
__device__ inline void from_float(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// Eight steps of a row as they lie in memory.
template <typename T>
struct alignas(16) Raw {
  T values[kSteps];
};

// Steps t .. t + 7 of a row, zero beyond its end; `vector` is the row's alignment.
template <typename T>
__device__ inline Raw<T> load(const T* row, int t, int length, int vector) {
  Raw<T> raw;
  if (vector == 16 && t + kSteps <= length) {
#pragma unroll
    for (int i = 0; i < sizeof(raw) / 16; ++i) {
      reinterpret_cast<uint4*>(&raw)[i] = reinterpret_cast<const uint4*>(row + t)[i];
    }
  } else if (vector == 8 && t + kSteps <= length) {
#pragma unroll
    for (int i = 0; i < sizeof(raw) / 8; ++i) {
      reinterpret_cast<uint2*>(&raw)[i] = reinterpret_cast<const uint2*>(row + t)[i];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      from_float(0.f, raw.values[j]);
      if (t + j < length) raw.values[j] = row[t + j];
    }
  }
  return raw;
}

template <typename T>
__device__ inline void store(const float (&values)[kSteps], T* row, int t, int length, int vector) {
  Raw<T> raw;
#pragma unroll
  for (int j = 0; j < kSteps; ++j) from_float(values[j], raw.values[j]);
  if (vector == 16 && t + kSteps <= length) {
#pragma unroll
    for (int i = 0; i < sizeof(raw) / 16; ++i) {
      reinterpret_cast<uint4*>(row + t)[i] = reinterpret_cast<const uint4*>(&raw)[i];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      if (t + j < length) row[t + j] = raw.values[j];
    }
  }
}

template <typename T>
__device__ inline void unpack(const Raw<T>& raw, float (&to)[kSteps]) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j) to[j] = to_float(raw.values[j]);
}

// log1p(z) / z on [0, 1], relative error 3e-8
__device__ inline float log1p_ratio(float z) {
  float p = 5.232669413e-3f;
  p = fmaf(p, z, -2.950513735e-2f);
  p = fmaf(p, z, 7.822578400e-2f);
  p = fmaf(p, z, -1.366323084e-1f);
  p = fmaf(p, z, 1.910599917e-1f);
  p = fmaf(p, z, -2.484298050e-1f);
  p = fmaf(p, z, 3.331909776e-1f);
  p = fmaf(p, z, -4.999949336e-1f);
  return fmaf(p, z, 9.999999404e-1f);
}

// A for powers of two. Beyond float it stays finite, so that a step of 0, like those beyond the end, keeps the state
// instead of making NaN of it; NaN itself stays NaN. Decays by steps below 3e-37 are then too great.
__device__ inline float base_two(float A) {
  const float A2 = A * kLog2e;
  return fabsf(A2) > FLT_MAX ? copysignf(FLT_MAX, A2) : A2;
}

// softplus(x) = max(x, 0) + log1p(exp(-|x|)); z is that exponential
__device__ inline float softplus(float x, float& z) {
  z = exp2f(-fabsf(x) * kLog2e);
  return fmaf(z, log1p_ratio(z), fmaxf(x, 0.f));
}

// Step sizes before softplus: delta + bias, with steps beyond the end made such that they come to 0.
template <typename T>
__device__ inline void raw_steps(const Raw<T>& delta, float bias, bool use_softplus, int t, int length,
                                 float (&x)[kSteps]) {
  unpack(delta, x);
#pragma unroll
  for (int j = 0; j < kSteps; ++j) x[j] += bias;
  if (t + kSteps > length) {
    const float nothing = use_softplus ? -INFINITY : 0.f;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) x[j] = t + j < length ? x[j] : nothing;
  }
}

// h -> decay h + drive, what a stretch of steps does to a state. Inclusive scan over kLanes lanes, from the first lane
// up (kUp) or from the last down.
template <int kLanes, bool kUp>
__device__ inline void warp_scan(float& decay, float& drive, int part) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const float before = kUp ? __shfl_up_sync(kFullMask, decay, offset, kLanes)
                             : __shfl_down_sync(kFullMask, decay, offset, kLanes);
    const float entering = kUp ? __shfl_up_sync(kFullMask, drive, offset, kLanes)
                               : __shfl_down_sync(kFullMask, drive, offset, kLanes);
    if (kUp ? part >= offset : part + offset < kLanes) {
      drive = fmaf(decay, entering, drive);
      decay *= before;
    }
  }
}

// The state that enters each lane's steps, from the inclusive scan and the state `carry` that enters the first.
template <int kLanes, bool kUp>
__device__ inline float entering_state(float decay, float drive, float carry, int part) {
  const float through = fmaf(decay, carry, drive);
  const float entering =
      kUp ? __shfl_up_sync(kFullMask, through, 1, kLanes) : __shfl_down_sync(kFullMask, through, 1, kLanes);
  return part == (kUp ? 0 : kLanes - 1) ? carry : entering;
}

template <int kLanes>
__device__ inline float lane_sum(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  return v;
}

// Which channels a thread works on. A block owns warps * turns * kSlots channels of one pair.
template <int kLanes>
struct Place {
  static constexpr int kSlots = 32 / kLanes;
  int64_t pair;
  int split, warp, part, slot, group;

  __device__ explicit Place(const Args& p)
      : pair(blockIdx.x / p.splits), split(blockIdx.x % p.splits), warp(threadIdx.x / 32), part(threadIdx.x % kLanes),
        slot(threadIdx.x % 32 / kLanes), group(static_cast<int>(pair % p.groups)) {}

  // The thread's channel of its group in a turn; may lie beyond the last.
  __device__ int channel(const Args& p, int turn) const {
    return ((split * p.turns + turn) * p.warps + warp) * kSlots + slot;
  }
  // A cell of the block's array of one number a channel and state.
  __device__ int cell(const Args& p, int turn, int state) const {
    return ((turn * p.warps + warp) * kSlots + slot) * p.states + state;
  }
};

}  // namespace scan
}  // namespace mmvmamba

// What both directions of the selective scan share: eight consecutive steps in registers, warp scans, who does what.
#pragma once

#include <cfloat>

#include "common/convert.cuh"
#include "common/launch.cuh"
#include "common/softplus.cuh"
#include "selective_scan/kernels.h"

namespace mmvmamba {
namespace scan {

constexpr unsigned kFullMask = 0xffffffffu;

// Eight steps of a row as they lie in memory.
template <typename T>
struct alignas(16) Raw {
  T values[kSteps];
};

// Steps t .. t + 7 of a row, zero beyond its end; `vector` is the row's alignment.
template <typename T>
__device__ __forceinline__ Raw<T> load(const T* row, int t, int length, int vector) {
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
      raw.values[j] = narrow<T>(0.f);
      if (t + j < length) raw.values[j] = row[t + j];
    }
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ void store(const float (&values)[kSteps], T* row, int t, int length, int vector) {
  Raw<T> raw;
#pragma unroll
  for (int j = 0; j < kSteps; ++j) raw.values[j] = narrow<T>(values[j]);
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
__device__ __forceinline__ void unpack(const Raw<T>& raw, float (&to)[kSteps]) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j) to[j] = widen(raw.values[j]);
}

// A for powers of two. Beyond float it stays finite, so that a step of 0, like those beyond the end, keeps the state
// instead of making NaN of it; NaN itself stays NaN. Decays by steps below 3e-37 are then too great.
__device__ __forceinline__ float base_two(float A) {
  const float A2 = A * kLog2e;
  return fabsf(A2) > FLT_MAX ? copysignf(FLT_MAX, A2) : A2;
}

// Step sizes before softplus: delta + bias, with steps beyond the end made such that they come to 0.
template <typename T>
__device__ __forceinline__ void raw_steps(const Raw<T>& delta, float bias, bool use_softplus, int t, int length,
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
__device__ __forceinline__ void warp_scan(float& decay, float& drive, int part) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const float before =
        kUp ? __shfl_up_sync(kFullMask, decay, offset, kLanes) : __shfl_down_sync(kFullMask, decay, offset, kLanes);
    const float entering =
        kUp ? __shfl_up_sync(kFullMask, drive, offset, kLanes) : __shfl_down_sync(kFullMask, drive, offset, kLanes);
    if (kUp ? part >= offset : part + offset < kLanes) {
      drive = fmaf(decay, entering, drive);
      decay *= before;
    }
  }
}

// The state that enters each lane's steps, from the inclusive scan and the state `carry` that enters the first.
template <int kLanes, bool kUp>
__device__ __forceinline__ float entering_state(float decay, float drive, float carry, int part) {
  const float through = fmaf(decay, carry, drive);
  const float entering =
      kUp ? __shfl_up_sync(kFullMask, through, 1, kLanes) : __shfl_down_sync(kFullMask, through, 1, kLanes);
  return part == (kUp ? 0 : kLanes - 1) ? carry : entering;
}

template <int kLanes>
__device__ __forceinline__ float lane_sum(float v) {
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

  __device__ __forceinline__ explicit Place(const Args& p)
      : pair(blockIdx.x / p.splits),
        split(blockIdx.x % p.splits),
        warp(threadIdx.x / 32),
        part(threadIdx.x % kLanes),
        slot(threadIdx.x % 32 / kLanes),
        group(static_cast<int>(pair % p.groups)) {}

  // The thread's channel of its group in a turn; may lie beyond the last.
  __device__ __forceinline__ int channel(const Args& p, int turn) const {
    return ((split * p.turns + turn) * p.warps + warp) * kSlots + slot;
  }
  // A cell of the block's array of one number a channel and state.
  __device__ __forceinline__ int cell(const Args& p, int turn, int state) const {
    return ((turn * p.warps + warp) * kSlots + slot) * p.d_state + state;
  }
};

// A block's part of the problem: the B and C of its group, and the rows that its turns take.
template <typename T, bool kSingle, int kLanes>
struct Work {
  const Args& p;
  const Place<kLanes> place;
  const int N;
  const T *B, *C;

  __device__ __forceinline__ explicit Work(const Args& args)
      : p(args),
        place(p),
        N(kSingle ? 1 : p.d_state),
        B(static_cast<const T*>(p.B) + place.pair * N * p.length),
        C(static_cast<const T*>(p.C) + place.pair * N * p.length) {}

  // Whether a thread has a channel in a turn; without one it works on its group's last, and stores nothing.
  __device__ __forceinline__ bool valid(int turn) const { return place.channel(p, turn) < p.channels; }
  __device__ __forceinline__ int64_t row_of(int turn) const {
    return place.pair * p.channels + min(place.channel(p, turn), p.channels - 1);  // dim is groups * channels
  }
  __device__ __forceinline__ int channel_of(int64_t row) const {
    return static_cast<int>(row - place.pair / p.groups * p.groups * p.channels);
  }
  // Eight steps of a tensor shaped like u, and of B or C of a state.
  __device__ __forceinline__ Raw<T> load_row(const void* from, int64_t row, int t) const {
    return load(static_cast<const T*>(from) + row * p.length, t, p.length, p.vector);
  }
  __device__ __forceinline__ Raw<T> load_state(const T* from, int n, int t) const {
    return load(from + n * static_cast<int64_t>(p.length), t, p.length, p.vector);
  }
};

}  // namespace scan
}  // namespace mmvmamba

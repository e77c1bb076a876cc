// Forward scan kernel of the fused SS2D core for small maps, N = 1: a block holds the whole image, and takes both pairs
// of routes one after the other.
//
// forward_image_kernel: a block takes 32 channels of one image, a warp each segment, as in ss2d_forward.cuh. The input
//   stays in shared memory, where the second pair reads it in its own order; y goes from the one order to the other
//   through shared memory. So the image is read once and written once, nothing waits for other blocks, and the second
//   pair's maps arrive while the first is scanned.
//   Moves: x once, maps once a group (shared through L2), y once, states if training.
#pragma once

#include "ss2d/scan.cuh"

namespace mmvmamba {
namespace ss2d {

// Shared memory of a block: carries, the pixels of both pairs' steps, the image, of each warp scratch (a tile of u2; all
// together y of the image), then of each warp maps.
template <typename T, int Rank> struct ImageMemory {
  Carry* local;  // [2][warps][32]
  int* order;    // [2][warps * kSegment]
  T* image;      // [warps * kSegment][32], what lies beyond the image is zero
  char *scratch, *maps, *operands;
  float* y;      // [warps * kSegment][32], in the scratch of all warps

  static constexpr int kScratch = std::max<int>(Projected<T, Rank>::kTileBytes, Segment<float>::kSize * sizeof(float));
  static constexpr int kShared = 2 * 32 * sizeof(Carry) + 2 * kSegment * sizeof(int) + Segment<T>::kSize * sizeof(T);
  // The operands are kept where few blocks run beside one another, each of many warps.
  __host__ __device__ static int kept(const Args& p, int warps) {
    return warps > kMaxWarps ? kept_bytes<T, Rank>(p.map_columns) : 0;
  }
  static int bytes(const Args& p, int warps) {
    return warps * (kShared + kScratch + Maps<T, Rank>::bytes(p.map_columns)) + kept(p, warps);
  }

  __device__ __forceinline__ ImageMemory(const Args& p, const Place& at, void* shared)
      : local(static_cast<Carry*>(shared)), order(reinterpret_cast<int*>(local + 2 * at.warps * 32)),
        image(reinterpret_cast<T*>(order + 2 * at.warps * kSegment)),
        y(reinterpret_cast<float*>(image + at.warps * Segment<T>::kSize)) {
    scratch = reinterpret_cast<char*>(y) + at.warp * kScratch;
    maps = reinterpret_cast<char*>(y) + at.warps * kScratch + at.warp * Maps<T, Rank>::bytes(p.map_columns);
    operands = reinterpret_cast<char*>(y) + at.warps * (kScratch + Maps<T, Rank>::bytes(p.map_columns));
  }
};

// The pixels of a warp's segment, from the table in shared memory.
struct Pixels {
  int at[kSegment];
  __device__ __forceinline__ explicit Pixels(const int* table) {
#pragma unroll
    for (int t = 0; t < kSegment; t += 4) {
      const int4 four = *reinterpret_cast<const int4*>(table + t);
      at[t] = four.x, at[t + 1] = four.y, at[t + 2] = four.z, at[t + 3] = four.w;
    }
  }
};

template <typename T, int Rank, int MaxWarps, bool SecondReversed>
__global__ void __launch_bounds__(MaxWarps * 32, sizeof(T) == 4 || MaxWarps > kMaxWarps ? 2 : 3)
    forward_image_kernel(const __grid_constant__ Args p) {
  begin_kernel();
  extern __shared__ float4 shared[];
  using Memory = ImageMemory<T, Rank>;
  int group;
  Place at(p, p.by_groups, group);
  at.select_group(p, group);
  at.select_pair(p, 0);
  const int lane = at.lane, warp = at.warp, warps = at.warps, steps = warps * kSegment;
  const Memory memory(p, at, shared);
  Carry* local = memory.local;
  const uint32_t own_image = shared_address(memory.image + lane), own_y = shared_address(memory.y + lane);
  const Maps<T, Rank> maps(p, memory.maps);
  constexpr bool keeps = MaxWarps > kMaxWarps;  // the operands
  const auto operand = [&](int route) {
    return keeps ? operand_at<T, Rank>(p, at, memory.operands, route) : operand_of<T, Rank>(p, at, route);
  };

  Place second = at;
  second.select_pair(p, 1);
  second.tabulate(p, memory.order + steps + at.first);
  at.tabulate(p, memory.order + at.first);
  Segment<T>(p, at).load(p, at, static_cast<const T*>(p.x) + at.batch * p.length * p.channels, p.channels,
                         memory.image + warp * Segment<T>::kSize);
  maps.load(p, at);
  if (keeps) load_operands<T, Rank>(p, at, memory.operands);
  const float skip = p.skip[at.padded_channel];
  float y[kSegment];
#pragma unroll 1
  for (int pair = 0; pair < 2; ++pair) {
    at.select_pair(p, pair);
    const int* own_order = memory.order + at.first;
    const int *here = own_order + pair * steps, *other = own_order + (1 - pair) * steps;
    const float* A = p.A + 2 * pair * p.padded + at.padded_channel;
    const float A0 = A[0], A1 = A[p.padded];
    at.pixels = here;
    const Segment<T> segment(p, at);
    wait_for_copies();
    maps.convert(p, lane);
    __syncthreads();
    Values<T> x;
    {
      const Pixels pixels(here);
      T raw[kSegment];
#pragma unroll
      for (int t = 0; t < kSegment; ++t) raw[t] = load_shared<T>(own_image + pixels.at[t] * (32 * sizeof(T)));
      x.set_raw(raw);
    }
    if (pair == 0) {
#pragma unroll
      for (int t = 0; t < kSegment; ++t) y[t] = skip * x[t];
    }

    Values<T> through0, through1;
    {
      const Projected<T, Rank> u(p, at, maps, segment, operand(0), memory.scratch, 0);
      local[warp * 32 + lane] = scan_segment<T, Rank, false, true>(maps, 0, u, x, A0, y, through0);
    }
    {
      const Projected<T, Rank> u(p, at, maps, segment, operand(1), memory.scratch, 1);
      local[(warps + warp) * 32 + lane] = scan_segment<T, Rank, SecondReversed, true>(maps, 1, u, x, A1, y, through1);
    }
    __syncthreads();
    if (pair == 0) {
      at.select_pair(p, 1);
      at.pixels = other;
      maps.load(p, at);
      if (keeps) load_operands<T, Rank>(p, at, memory.operands);
    }
    const float state0 = incoming<MaxWarps>(local, 0.f, false, warp, warps, lane);
    const float state1 = incoming<MaxWarps>(local + warps * 32, 0.f, SecondReversed, warp, warps, lane);
    if (p.states != nullptr && at.active) {
      float* to = p.states + ((at.batch * p.segments + warp) * 4 + 2 * pair) * p.channels + at.channel;
      to[0] = state0;
      to[p.channels] = state1;
    }
    const Pixels from(here);
#pragma unroll
    for (int t = 0; t < kSegment; ++t) {
      store_shared(own_y + from.at[t] * 128, fmaf(through1[t], state1, fmaf(through0[t], state0, y[t])));
    }
    __syncthreads();
    const Pixels to(other);
#pragma unroll
    for (int t = 0; t < kSegment; ++t) y[t] = load_shared<float>(own_y + to.at[t] * 128);
    __syncthreads();  // before anyone projects, or stores, by way of scratch
  }
  at.select_pair(p, 0);
  at.pixels = memory.order + at.first;
  if (p.float_output) {
    store_output(p, at, Segment<float>(p, at), memory.scratch, y);
  } else {
    store_output(p, at, Segment<T>(p, at), memory.scratch, y);
  }
}

}  // namespace ss2d
}  // namespace mmvmamba

// Forward scan kernel of the fused SS2D core for small maps, N = 1: a block holds the whole image, and takes both pairs
// of routes one after the other.
//
// ForwardImageKernel: a block takes 32 channels of one image, a warp each segment, as in forward.cuh. The input
//   stays in shared memory, where the second pair reads it in its own order; y goes from the one order to the other
//   through shared memory. So the image is read once and written once, nothing waits for other blocks, and the second
//   pair's projections arrive while the first is scanned.
//   Moves: x once, projections once a group (shared through L2), y once, states if training.
#pragma once

#include "ss2d/scan.cuh"

namespace mmvmamba {
namespace ss2d {

// Shared memory of a block: carries, the pixels of both pairs' steps, the image, of each warp scratch (a tile of u2;
// all together y of the image), then of each warp projections.
template <typename T, int Rank> struct ImageMemory {
  Carry* local;  // [2][warps][32]
  int* order;    // [2][warps * kSegment]
  T* image;      // [warps * kSegment][32], what lies beyond the image is zero
  char *scratch, *projections, *operands;
  float* y;  // [warps * kSegment][32], in the scratch of all warps

  static constexpr int kScratch = std::max<int>(Projected<T, Rank>::kTileBytes, Segment<float>::kSize * sizeof(float));
  static constexpr int kShared = 2 * 32 * sizeof(Carry) + 2 * kSegment * sizeof(int) + Segment<T>::kSize * sizeof(T);
  // The operands are kept where few blocks run beside one another, each of many warps.
  __host__ __device__ static int kept(const Args& p, int warps) {
    return warps > kMaxWarps ? kept_bytes<T, Rank>(p.projection_columns) : 0;
  }
  static int bytes(const Args& p, int warps) {
    return warps * (kShared + kScratch + Projections<T, Rank>::bytes(p.projection_columns)) + kept(p, warps);
  }

  __device__ __forceinline__ ImageMemory(const Args& p, const Place& at, void* shared)
      : local(static_cast<Carry*>(shared)),
        order(reinterpret_cast<int*>(local + 2 * at.warps * 32)),
        image(reinterpret_cast<T*>(order + 2 * at.warps * kSegment)),
        y(reinterpret_cast<float*>(image + at.warps * Segment<T>::kSize)) {
    scratch = reinterpret_cast<char*>(y) + at.warp * kScratch;
    projections =
        reinterpret_cast<char*>(y) + at.warps * kScratch + at.warp * Projections<T, Rank>::bytes(p.projection_columns);
    operands = reinterpret_cast<char*>(y) + at.warps * (kScratch + Projections<T, Rank>::bytes(p.projection_columns));
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

// The values of a lane's channel at pixels of an image in shared memory, [pixels][32].
template <typename T> __device__ __forceinline__ Values<T> read_image(uint32_t image, const Pixels& pixels) {
  T raw[kSegment];
#pragma unroll
  for (int t = 0; t < kSegment; ++t) raw[t] = load_shared<T>(image + pixels.at[t] * (32 * sizeof(T)));
  Values<T> x;
  x.set_raw(raw);
  return x;
}

template <typename T, int Rank, int MaxWarps, bool SecondReversed> struct ForwardImageKernel {
  static constexpr int kThreads = MaxWarps * 32, kBlocks = sizeof(T) == 4 || MaxWarps > kMaxWarps ? 2 : 3;
  static constexpr bool kKeeps = MaxWarps > kMaxWarps;  // the operands
  using Memory = ImageMemory<T, Rank>;

  // Begin to load the projections of the pair that `at` is on.
  static __device__ __forceinline__ void load_pair(const Args& p, const Place& at, const Memory& memory,
                                                   const Projections<T, Rank>& projections) {
    projections.load(p, at);
    if (kKeeps) load_operands<T, Rank>(p, at, memory.operands);
  }

  // Add what entered the segments, save the states, and take y from the order of this pair to that of the other.
  static __device__ __forceinline__ void finish_pair(const Args& p, const Place& at, int pair, const Memory& memory,
                                                     uint32_t own_y, const int* here, const int* other,
                                                     const Values<T>& through0, const Values<T>& through1,
                                                     float (&y)[kSegment]) {
    const float state0 = incoming<MaxWarps>(memory.local, 0.f, false, at.warp, at.warps, at.lane);
    const float state1 =
        incoming<MaxWarps>(memory.local + at.warps * 32, 0.f, SecondReversed, at.warp, at.warps, at.lane);
    if (p.states != nullptr && at.active) {
      float* to = p.states + ((at.batch * p.segments + at.warp) * 4 + 2 * pair) * p.channels + at.channel;
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

  static __device__ __forceinline__ void run(const Args& p) {
    Place at = Place::of_group(p);
    at.select_pair(p, 0);
    const int lane = at.lane, steps = at.warps * kSegment;
    const Memory memory(p, at, shared_memory<void>());
    const uint32_t own_image = shared_address(memory.image + lane), own_y = shared_address(memory.y + lane);
    const Projections<T, Rank> projections(p, memory.projections);

    Place second = at;
    second.select_pair(p, 1);
    second.tabulate(p, memory.order + steps + at.first);
    at.tabulate(p, memory.order + at.first);
    Segment<T>(p, at).load(p, at, static_cast<const T*>(p.x) + at.batch * p.length * p.channels, p.channels,
                           memory.image + at.warp * Segment<T>::kSize);
    load_pair(p, at, memory, projections);
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
      projections.convert(p, lane);
      __syncthreads();
      const Values<T> x = read_image<T>(own_image, Pixels(here));
      if (pair == 0) {
#pragma unroll
        for (int t = 0; t < kSegment; ++t) y[t] = skip * x[t];
      }
      const auto operand = [&](int route) {
        return kKeeps ? operand_at<T, Rank>(p, at, memory.operands, route) : operand_of<T, Rank>(p, at, route);
      };
      Values<T> through0, through1;
      scan_pair<T, Rank, SecondReversed, true>(p, at, projections, segment, operand, memory.scratch, x, A0, A1, y,
                                               through0, through1, memory.local);
      __syncthreads();
      if (pair == 0) {
        at.select_pair(p, 1);
        at.pixels = other;
        load_pair(p, at, memory, projections);
      }
      finish_pair(p, at, pair, memory, own_y, here, other, through0, through1, y);
    }
    at.select_pair(p, 0);
    at.pixels = memory.order + at.first;
    if (p.float_output) {
      store_output(p, at, Segment<float>(p, at), memory.scratch, y);
    } else {
      store_output(p, at, Segment<T>(p, at), memory.scratch, y);
    }
  }
};

template <typename T, int Rank, bool SecondReversed>
using SmallImageKernel = ForwardImageKernel<T, Rank, kMaxWarps, SecondReversed>;
template <typename T, int Rank, bool SecondReversed>
using LargeImageKernel = ForwardImageKernel<T, Rank, kMaxImageWarps, SecondReversed>;

}  // namespace ss2d
}  // namespace mmvmamba

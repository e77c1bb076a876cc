// What the fused SS2D kernels for N = 2 to 16 states a channel share: where a warp works, its tile of pixels in shared
// memory, a step of the scan.
//
// Pairs, routes, q and the scaling of u2, d2, decay and drive are those of ss2d/common.cuh. With several states the
// exponentials decide, one a state and step (16 a clock and processor), so none is computed twice where that can be
// helped: a warp scans 32 channels (a *group*) of one route from end to end, with the states in registers, rather than
// segments from a zero state. Only where images are too few to fill the GPU, an image is a chain of blocks, whose
// carries a pass before finds. A *segment* is kSegment pixels between saved states, a *tile* kTile of them, which the
// warp has in shared memory, in float whatever the type.
//
// A thread has kChannels channels with kStates states each, N in all: as many threads share a channel as a thread has
// channels, so that each value of B and C is loaded once for kChannels channels, sums over states and channels are
// mostly within a thread, and what is left goes by shuffles. Thread `lane` = kChannels * i + k has the k-th share of
// the states of the channels kChannels * i + (j ^ k), j = 0, 1..: its channel 0 is the lane's own, and sums over the
// shares need no selection.
//
// The two routes of a pair are two warps of a block, over the same pixels. Each pixel of the output is written by one
// and then added to by the other: a route that runs backwards meets the first one in the middle, where the block waits;
// two routes that run the same way follow one another, a segment apart.
#pragma once

#include "common/convert.cuh"
#include "common/launch.cuh"
#include "common/softplus.cuh"
#include "common/vector.cuh"
#include "ss2d/states/kernels.h"

namespace mmvmamba {
namespace ss2d {
namespace states {

constexpr unsigned kAllLanes = 0xffffffffu;

template <int N> struct Split {
  static constexpr int kStates = N < 4 ? N : 4;
  static constexpr int kChannels = N / kStates;
};

// kStates neighbours at once, in shared or global memory.
template <int Count> struct alignas(4 * Count) Floats {
  float v[Count];
};

template <int N> __device__ __forceinline__ void clear(float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0.f;
}

// ---- where a warp works ---------------------------------------------------------------------------------------------
struct Place {
  int lane, route, q, group, channel, block, first, last;  // first, last: segments of the block
  int64_t batch;
  bool active, reversed;

  // Blocks are numbered by image, then by split of the groups, then along the chain. A block's warps are `groups` of
  // the first route, then as many of the second.
  __device__ __forceinline__ Place(const Args& p, int splits, int groups) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    route = warp >= groups, q = 2 * p.pair + route;
    block = blockIdx.x % p.chain;
    const int above = blockIdx.x / p.chain;
    group = above % splits * groups + warp - route * groups;
    batch = above / splits;
    channel = group * 32 + lane;
    active = channel < p.channels;
    reversed = route == 1 && p.second_reversed;
    first = block * p.chunk;
    last = min(p.segments, first + p.chunk);
  }
  __device__ __forceinline__ bool exists(const Args& p) const { return group < p.groups; }
  // A padded channel that exists, to load from.
  __device__ __forceinline__ int padded_channel(const Args& p) const { return min(channel, p.padded - 1); }

  // Where the lane's states are in (.., 4 or 2, groups, N * 32), by the number of rows before.
  template <int N> __device__ __forceinline__ int64_t states_at(const Args& p, int64_t row) const {
    return (row * p.groups + group) * (N * 32) + lane * Split<N>::kStates;
  }
};

// The walk of a block's warps over its segments, of scans (`Against` false) or of their adjoints.
struct Walk {
  int number, meeting;  // of segments; before which turn the block waits
  bool backwards, lagging, follows;

  __device__ __forceinline__ Walk(const Args& p, const Place& at, bool against)
      : number(at.last - at.first), backwards(at.reversed != against), lagging(!p.second_reversed) {
    const int half = number / 2;
    follows = lagging && at.route == 1;
    meeting = backwards ? number - half : half;
  }
  __device__ __forceinline__ int turns() const { return number + 1; }
  // Wait for the other route if this is where both meet. All warps of the block take every turn.
  __device__ __forceinline__ void meet(int turn) const {
    if (lagging || turn == meeting) __syncthreads();
  }
  // The segment of a turn, counted from the block's first; or -1.
  __device__ __forceinline__ int segment(int turn) const { return nth(turn - follows); }
  // The segment that is taken as the `own`-th.
  __device__ __forceinline__ int nth(int own) const {
    if (own < 0 || own >= number) return -1;
    return backwards ? number - 1 - own : own;
  }
  __device__ __forceinline__ int following(int turn) const { return nth(turn - follows + 1); }
  // Whether the other route has been at the pixels of this turn before.
  __device__ __forceinline__ bool second(int turn) const { return lagging ? follows : turn >= meeting; }
};

// Pixels of a tile.
struct TileRange {
  int start, count;
};

// The tiles of a block, in the order of the pixels.
struct Tiles {
  int begin, end, length;

  __device__ __forceinline__ Tiles(const Args& p, const Place& at)
      : begin(at.first * kSegmentTiles),
        end(min(at.last * kSegmentTiles, (p.length + kTile - 1) / kTile)),
        length(p.length) {}
  __device__ __forceinline__ bool have(int number) const { return number >= begin && number < end; }
  __device__ __forceinline__ TileRange range(int number) const {
    return TileRange{number * kTile, min(kTile, length - number * kTile)};
  }
  __device__ __forceinline__ int of_segment(int segment) const {
    return min(kSegmentTiles, end - segment * kSegmentTiles);
  }
};

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

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
  __device__ __forceinline__ int segment(int turn) const {
    const int own = turn - follows;
    if (own < 0 || own >= number) return -1;
    return backwards ? number - 1 - own : own;
  }
  // Whether the other route has been at the pixels of this turn before.
  __device__ __forceinline__ bool second(int turn) const { return lagging ? follows : turn >= meeting; }
};

// ---- tiles ----------------------------------------------------------------------------------------------------------
// A warp's shared memory, for kTile pixels.
template <int N> struct Tile {
  float *x, *d2, *out;  // [kTile][32]; out: y in forward, dy in backward
  float* bc;            // [kTile][2N]
  int* pixels;          // [kTile]: where they are in the image
  float* rest;          // dt, and in backward the checkpoints

  __device__ __forceinline__ Tile(int warp, int rest_floats)
      : x(shared_memory<float>() + warp * (tile_floats(N) + rest_floats)),
        d2(x + kTile * 32),
        out(d2 + kTile * 32),
        bc(out + kTile * 32),
        pixels(reinterpret_cast<int*>(bc + kTile * 2 * N)),
        rest(reinterpret_cast<float*>(pixels) + kPixelFloats) {}

  // Load what a scan needs of the `count` pixels from `start`: x (or nothing), d2, B and C; zeros beyond, which make
  // steps inert. `x_of` is the image's first pixel, null if x is not needed.
  template <typename T>
  __device__ __forceinline__ void load(const Args& p, const Place& at, int start, int count, const void* map,
                                       float* map_tile) const {
    __syncwarp();  // all lanes are done with the tile before
    if (at.lane < kTile) {
      const int step = start + min(at.lane, count - 1);
      pixels[at.lane] = p.column_order ? step % p.height * p.width + step / p.height : step;
    }
    __syncwarp();
    const int64_t image = at.batch * p.length;
    const T* projections = static_cast<const T*>(p.projections) + (image * 4 + at.q) * p.columns;
    const T* own = static_cast<const T*>(map) + image * p.channels + at.channel;
    float values[kTile];
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      values[t] = at.active && t < count ? widen(own[static_cast<int64_t>(pixels[t]) * p.channels]) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kTile * 2 * N; i += 32) {
      const int t = (i + at.lane) / (2 * N), column = (i + at.lane) % (2 * N);
      if (t < kTile) {
        const T* from = projections + static_cast<int64_t>(pixels[t]) * 4 * p.columns + p.dt_columns + column;
        bc[t * 2 * N + column] = t < count ? widen(*from) : 0.f;
      }
    }
#pragma unroll
    for (int t = 0; t < kTile; ++t) map_tile[t * 32 + at.lane] = values[t];
    step_sizes<T>(p, at, count, projections);
    __syncwarp();
  }

  // d2 of the lane's channel, from u2 in memory or from dt.
  template <typename T>
  __device__ __forceinline__ void step_sizes(const Args& p, const Place& at, int count, const T* projections) const {
    const int channel = at.padded_channel(p);
    const float bias = p.bias[at.q * p.padded + channel];
    float u[kTile];
    if (p.u != nullptr) {
      const T* own = static_cast<const T*>(p.u) + (at.batch * p.length * 4 + at.q) * p.channels + at.channel;
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        u[t] = bias + (at.active && t < count ? widen(own[static_cast<int64_t>(pixels[t]) * 4 * p.channels]) : 0.f);
      }
    } else {
      for (int i = at.lane; i < kTile * p.rank; i += 32) {
        const int t = i / p.rank, r = i % p.rank;
        rest[r * kTile + t] = widen(projections[static_cast<int64_t>(pixels[t]) * 4 * p.columns + r]);
      }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < kTile; ++t) u[t] = bias;
      const float* weight = p.dt_weight + at.q * p.rank * p.padded + channel;
      for (int r = 0; r < p.rank; ++r) {
        const float w = weight[r * p.padded];
#pragma unroll
        for (int t = 0; t < kTile; t += 4) {
          const Floats<4> dt = *reinterpret_cast<const Floats<4>*>(rest + r * kTile + t);
#pragma unroll
          for (int i = 0; i < 4; ++i) u[t + i] = fmaf(w, dt.v[i], u[t + i]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTile; ++t) d2[t * 32 + at.lane] = at.active && t < count ? softplus2<T>(u[t]) : 0.f;
  }
};

// ---- a thread's states ----------------------------------------------------------------------------------------------
template <int N> struct Thread {
  static constexpr int kStates = Split<N>::kStates, kChannels = Split<N>::kChannels;
  using Vector = Floats<kStates>;
  int share;                // of the states
  int channels[kChannels];  // in the group
  float A[N];               // [kChannels][kStates], as all arrays of N

  __device__ __forceinline__ Thread(const Args& p, const Place& at) : share(at.lane % kChannels) {
    const int group = min(at.group, p.groups - 1) * 32;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      channels[j] = at.lane - share + (j ^ share);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        A[j * kStates + i] = p.A[(at.q * N + share * kStates + i) * p.padded + group + channels[j]];
      }
    }
  }

  // N values as [kChannels][32 lanes][kStates].
  __device__ __forceinline__ static void load(const float* from, float (&h)[N]) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const Vector vector = *reinterpret_cast<const Vector*>(from + j * 32 * kStates);
#pragma unroll
      for (int i = 0; i < kStates; ++i) h[j * kStates + i] = vector.v[i];
    }
  }
  __device__ __forceinline__ static void store(float* to, const float (&h)[N]) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      Vector vector;
#pragma unroll
      for (int i = 0; i < kStates; ++i) vector.v[i] = h[j * kStates + i];
      *reinterpret_cast<Vector*>(to + j * 32 * kStates) = vector;
    }
  }

  // Values of the thread's channels at a step, of [kTile][32].
  __device__ __forceinline__ void read(const float* tile, int t, float (&values)[kChannels]) const {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) values[j] = tile[t * 32 + channels[j]];
  }
  __device__ __forceinline__ Vector B(const Tile<N>& tile, int t) const {
    return *reinterpret_cast<const Vector*>(tile.bc + t * 2 * N + share * kStates);
  }
  __device__ __forceinline__ Vector C(const Tile<N>& tile, int t) const {
    return *reinterpret_cast<const Vector*>(tile.bc + t * 2 * N + N + share * kStates);
  }

  // Sum over the states' shares; the lane's own channel is left in values[0].
  __device__ __forceinline__ static void add_shares(float (&values)[kChannels]) {
    static_assert(kChannels <= 4, "two exchanges");
    if constexpr (kChannels == 4) {
      values[0] += __shfl_xor_sync(kAllLanes, values[2], 2);
      values[1] += __shfl_xor_sync(kAllLanes, values[3], 2);
    }
    if constexpr (kChannels >= 2) values[0] += __shfl_xor_sync(kAllLanes, values[1], 1);
  }

  // One step: h from before it to after it; with outputs C h of the thread's channels.
  template <bool WithOutput>
  __device__ __forceinline__ void step(const Tile<N>& tile, int t, float (&h)[N], float (&y)[kChannels]) const {
    float d2[kChannels], x[kChannels];
    read(tile.d2, t, d2);
    read(tile.x, t, x);
    const Vector b = B(tile, t);
    Vector c;
    if constexpr (WithOutput) c = C(tile, t);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const float drive = d2[j] * x[j];
      if constexpr (WithOutput) y[j] = 0.f;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        float& state = h[j * kStates + i];
        state = fmaf(exp2_fast(A[j * kStates + i] * d2[j]), state, drive * b.v[i]);
        if constexpr (WithOutput) y[j] = fmaf(c.v[i], state, y[j]);
      }
    }
  }
};

template <int N> __device__ __forceinline__ void clear(float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0.f;
}

// The tile of a segment that a scan meets as the `index`-th: its first pixel and their number. `start` and `count` are
// the segment's.
struct TileRange {
  int start, count;
  __device__ __forceinline__ TileRange(bool reversed, int index, int segment_start, int segment_count) {
    const int tiles = (segment_count + kTile - 1) / kTile, number = reversed ? tiles - 1 - index : index;
    start = segment_start + number * kTile;
    count = min(kTile, segment_count - number * kTile);
  }
};

// Add to what is in memory, or write: the lane's channel of a tile, to an image of E with `stride` elements a pixel.
template <typename E, typename Value>
__device__ __forceinline__ void flush(E* own, int64_t stride, const int* pixels, int count, bool active, bool adds,
                                      Value value) {
  if (!active) return;
  float before[kTile];
#pragma unroll
  for (int t = 0; t < kTile; ++t) before[t] = adds && t < count ? widen(own[pixels[t] * stride]) : 0.f;
#pragma unroll
  for (int t = 0; t < kTile; ++t) {
    if (t < count) own[pixels[t] * stride] = narrow<E>(before[t] + value(t));
  }
}

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

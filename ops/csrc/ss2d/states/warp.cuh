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

// The dt rank if the kernels project dt, else 0.
__host__ __device__ inline int fused_rank(const Args& p) { return p.u == nullptr ? p.rank : 0; }

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
  __device__ __forceinline__ int segment(int turn) const {
    const int own = turn - follows;
    if (own < 0 || own >= number) return -1;
    return backwards ? number - 1 - own : own;
  }
  // Whether the other route has been at the pixels of this turn before.
  __device__ __forceinline__ bool second(int turn) const { return lagging ? follows : turn >= meeting; }
};

// ---- tiles ----------------------------------------------------------------------------------------------------------
constexpr int kPart = 8, kParts = 32 / kPart, kRowParts = 8;  // channels, or columns, that a lane moves at once

// A warp's shared memory, for kTile pixels, in the order in which the scan meets them. All from one address, so that a
// step needs few of them.
struct Tile {
  float* base;
  int width, first_column, b_column;  // of a row; of memory, where rows begin; where B begins in a row

  __device__ __forceinline__ Tile(const Args& p, int warp, int warp_floats, int row_width)
      : base(shared_memory<float>() + warp * warp_floats),
        width(row_width),
        first_column(p.u == nullptr ? 0 : p.dt_columns),
        b_column(p.dt_columns - first_column) {}

  __device__ __forceinline__ int* pixels() const { return reinterpret_cast<int*>(base + kTilePixels); }
  __device__ __forceinline__ float* row(int t) const { return base + kTileRows + t * width; }

  // Where the `count` pixels from `start` are in memory, in the order of the scan; those beyond are the last.
  __device__ __forceinline__ void locate(const Args& p, const Place& at, int start, int count) const {
    __syncwarp();  // all lanes are done with the tile before
    if (at.lane < 16) {
      const int number = min(at.lane, count - 1), step = start + (at.reversed ? count - 1 - number : number);
      pixels()[at.lane] = p.column_order ? step % p.height * p.width + step / p.height : step;
    }
    __syncwarp();
  }

  // The group's channels of a map, `stride` elements from one pixel to the next, to the values at `to`; zeros beyond.
  template <typename E>
  __device__ __forceinline__ void load_map(const Args& p, const Place& at, const E* map, int stride, int count,
                                           int to) const {
    const int first = at.group * 32;
    if (p.channels % kPart == 0) {
      const int part = at.lane % kParts * kPart;
      const bool inside = first + part < p.channels;
      const E* from = map + (inside ? first + part : 0);
      float values[2][kPart];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load(from + static_cast<int64_t>(pixels()[at.lane / kParts + 8 * i]) * stride, values[i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = at.lane / kParts + 8 * i;
        if (inside && t < count) {
          store(base + to + t * 32 + part, values[i]);
        } else if (t < kTile) {
          clear(values[i]);
          store(base + to + t * 32 + part, values[i]);
        }
      }
    } else {
#pragma unroll 1
      for (int t = 0; t < kTile; ++t) {
        const bool valid = at.active && t < count;
        base[to + t * 32 + at.lane] = valid ? widen(map[static_cast<int64_t>(pixels()[t]) * stride + at.channel]) : 0.f;
      }
    }
  }

  // The values at `from` to a map: written, or added to what is there.
  template <typename E>
  __device__ __forceinline__ void store_map(const Args& p, const Place& at, E* map, int stride, int count, int from,
                                            bool adds) const {
    const int first = at.group * 32;
    if (p.channels % kPart == 0) {
      const int part = at.lane % kParts * kPart;
      if (first + part >= p.channels) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = at.lane / kParts + 8 * i;
        if (t >= count) break;
        E* to = map + static_cast<int64_t>(pixels()[t]) * stride + first + part;
        float values[kPart], before[kPart];
        load(base + from + t * 32 + part, values);
        if (adds) {
          load(static_cast<const E*>(to), before);
#pragma unroll
          for (int j = 0; j < kPart; ++j) values[j] += before[j];
        }
        store(to, values);
      }
    } else if (at.active) {
#pragma unroll 1
      for (int t = 0; t < count; ++t) {
        E* to = map + static_cast<int64_t>(pixels()[t]) * stride + at.channel;
        *to = narrow<E>(base[from + t * 32 + at.lane] + (adds ? widen(*to) : 0.f));
      }
    }
  }

  // Load what a scan needs of the `count` pixels from `start`: a map to the values at `to`, d2, B and C; zeros beyond,
  // which make steps inert.
  template <typename T>
  __device__ __forceinline__ void load_steps(const Args& p, const Place& at, int start, int count, const void* map,
                                             int to) const {
    locate(p, at, start, count);
    const int64_t image = at.batch * p.length;
    load_map(p, at, static_cast<const T*>(map) + image * p.channels, p.channels, count, to);
    const T* rows = static_cast<const T*>(p.projections) + (image * 4 + at.q) * p.columns + first_column;
    const int column = at.lane % kRowParts * kPart;
    const T* from = rows + (column < width ? column : 0);
    float values[kTile / 4][kPart];
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) {
      load(from + static_cast<int64_t>(pixels()[at.lane / kRowParts + 4 * i]) * 4 * p.columns, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) {
      const int t = at.lane / kRowParts + 4 * i;
      if (t >= count) clear(values[i]);
      if (column < width) store(row(t) + column, values[i]);
    }
    if (p.u != nullptr) {
      const T* u = static_cast<const T*>(p.u) + (image * 4 + at.q) * p.channels;
      load_map(p, at, u, 4 * p.channels, count, kTileStepSizes);
    }
    __syncwarp();
    step_sizes<T>(p, at, count);
    __syncwarp();
  }

  // d2 of the lane's channel, from u2 without bias, which is in its place, or from dt.
  template <typename T> __device__ __forceinline__ void step_sizes(const Args& p, const Place& at, int count) const {
    const int channel = at.padded_channel(p);
    const float bias = p.bias[at.q * p.padded + channel];
    float* own = base + kTileStepSizes + at.lane;
    float u[kTile];
#pragma unroll
    for (int t = 0; t < kTile; ++t) u[t] = bias;
    if (p.u != nullptr) {
#pragma unroll
      for (int t = 0; t < kTile; ++t) u[t] += own[t * 32];
    } else {
      const float* weight = p.dt_weight + at.q * p.dt_columns * p.padded + channel;
#pragma unroll 1
      for (int r = 0; r < p.dt_columns; r += kDtStep) {
        float w[kDtStep];
#pragma unroll
        for (int i = 0; i < kDtStep; ++i) w[i] = weight[(r + i) * p.padded];
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
          float dt[kDtStep];
          load(static_cast<const float*>(row(t) + r), dt);
#pragma unroll
          for (int i = 0; i < kDtStep; ++i) u[t] = fmaf(w[i], dt[i], u[t]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTile; ++t) own[t * 32] = at.active && t < count ? softplus2<T>(u[t]) : 0.f;
  }
};

// ---- a thread's states ----------------------------------------------------------------------------------------------
template <int N> struct Thread {
  static constexpr int kStates = Split<N>::kStates, kChannels = Split<N>::kChannels;
  using Vector = Floats<kStates>;
  int lane, share;  // share: of the states
  float A[N];       // [kChannels][kStates], as all arrays of N

  __device__ __forceinline__ Thread(const Args& p, const Place& at) : lane(at.lane), share(at.lane % kChannels) {
    const int group = min(at.group, p.groups - 1) * 32;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        A[j * kStates + i] = p.A[(at.q * N + share * kStates + i) * p.padded + group + channel(j)];
      }
    }
  }

  // The thread's j-th channel in the group.
  __device__ __forceinline__ int channel(int j) const { return lane ^ j; }

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

  // Values of the thread's channels at a step, of those [kTile][32] at `from`.
  __device__ __forceinline__ void read(const float* from, int t, float (&values)[kChannels]) const {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) values[j] = from[t * 32 + channel(j)];
  }
  __device__ __forceinline__ Vector B(const Tile& tile, int t) const {
    return *reinterpret_cast<const Vector*>(tile.row(t) + tile.b_column + share * kStates);
  }
  __device__ __forceinline__ Vector C(const Tile& tile, int t) const {
    return *reinterpret_cast<const Vector*>(tile.row(t) + tile.b_column + share * kStates + N);
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

  // One step: h from before it to after it; with outputs C h of the thread's channels. Returns x of the lane's own.
  template <bool WithOutput>
  __device__ __forceinline__ float step(const Tile& tile, int t, float (&h)[N], float (&y)[kChannels]) const {
    float d2[kChannels], x[kChannels];
    read(tile.base + kTileStepSizes, t, d2);
    read(tile.base + kTileX, t, x);
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
    return x[0];
  }
};

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

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

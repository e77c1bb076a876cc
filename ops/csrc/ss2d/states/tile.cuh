// A tile: what a warp of the fused SS2D kernels for N = 2 to 16 states has of kTile pixels in shared memory, in the
// order in which the scan meets them. Steps beyond the image are inert.
//
// A tile comes in two halves of the way. While the tile before is computed, its values are copied in the background, as
// they are in memory, to *pieces*. Then they become what a step reads: step size and drive of each channel, next to
// each other and computed once, and B and C as float.
#pragma once

#include "common/copy.cuh"
#include "ss2d/states/warp.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

constexpr int kPart = 8;  // channels that a lane stores at once, and columns that it converts

// Where a warp's values of its image, route and group begin in the maps, of 1 and of 4 routes, and so on, but for the
// pixel and the channel in the group. In shared memory, since the registers that they would take hold states.
struct Sources {
  int64_t map, maps, rows, parts, states, partial;
  int weight, bias;
  int channels, reversed;  // channels: that the group has

  __device__ __forceinline__ int skip(const Args& p) const { return bias % p.padded; }

  __device__ __forceinline__ Sources(const Args& p, const Place& at, int states) {
    const int64_t image = at.batch * p.length, routes = image * 4 + at.q,
                  split = blockIdx.x / p.chain % max(1, p.splits);
    const int group = at.group * 32, padded = min(at.group, p.groups - 1) * 32;
    channels = at.exists(p) ? min(32, p.channels - group) : 0, reversed = at.reversed;
    map = image * p.channels + group, maps = routes * p.channels + group, rows = routes * p.columns;
    weight = at.q * p.dt_columns * p.padded + padded, bias = at.q * p.padded + padded;
    parts = (split * p.batch * p.length * 4 + routes) * (2 * states);
    // of the block's first segment
    this->states = (((at.batch * p.segments + at.first) * 4 + at.q) * p.groups + at.group) * (states * 32);
    partial = ((at.batch * p.chain + at.block) * 2 + at.route) * (states + 2) * p.padded + group;
  }
};

template <typename T, int N> struct Tile {
  static constexpr int kWidth = row_width(N), kSize = sizeof(T), kAligned = 16 / kSize;  // values of a copy
  float* base;
  char* pieces;
  int piece_step;  // bytes from one piece to the next

  __device__ __forceinline__ Tile(char* memory, char* pieces, int piece_step)
      : base(reinterpret_cast<float*>(memory)), pieces(pieces), piece_step(piece_step) {}

  __device__ __forceinline__ int* pixels(int which) const {
    return reinterpret_cast<int*>(base + kTilePixels) + kTile * which;
  }
  __device__ __forceinline__ float* row(int t) const { return base + kTileRows + t * kWidth; }
  template <typename E> __device__ __forceinline__ E* piece(int number) const {
    return reinterpret_cast<E*>(pieces + number * piece_step);
  }
  // Columns of a row in memory that the kernel needs, where they begin, and those of them that are dt.
  static __device__ __forceinline__ int columns(const Args& p) { return p.u == nullptr ? p.columns : kWidth; }
  static __device__ __forceinline__ int first_column(const Args& p) { return p.u == nullptr ? 0 : p.dt_columns; }
  static __device__ __forceinline__ int fused_columns(const Args& p) { return p.u == nullptr ? p.dt_columns : 0; }
  // The row of a pixel as it is in memory; and its u, behind the rows.
  __device__ __forceinline__ T* raw_row(int t, int columns) const {
    const int second = t >= kTile / 2;
    return piece<T>(kRowPieces + second) + (t - second * (kTile / 2)) * columns;
  }
  __device__ __forceinline__ T* raw_u(int t) const {
    const int second = t >= kTile / 2;
    return piece<T>(kRowPieces + second) + kTile / 2 * kWidth + (t - second * (kTile / 2)) * 32;
  }

  // ---- from memory, in the background
  __device__ __forceinline__ const Sources& sources() const {
    return *reinterpret_cast<const Sources*>(base + kTileSources);
  }
  __device__ __forceinline__ void leave_sources(const Args& p, const Place& at) const {
    static_assert(sizeof(Sources) <= 4 * (kTileRows - kTileSources), "of layout.h");
    if (at.lane == 0) *reinterpret_cast<Sources*>(base + kTileSources) = Sources(p, at, N);
    __syncwarp();
  }
  // What the lane saves of a segment of the block.
  __device__ __forceinline__ float* states_of(const Args& p, int segment) const {
    return p.states + sources().states + static_cast<int64_t>(segment) * (4 * p.groups * N * 32) +
           lane() * Split<N>::kStates;
  }
  __device__ __forceinline__ bool exists() const { return sources().channels > 0; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  // Where the pixels of a range are in memory, in the order of the scan; those beyond are the last.
  __device__ __forceinline__ void locate(const Args& p, const TileRange& range, int which) const {
    if (lane() < kTile) {
      const int number = min(lane(), range.count - 1);
      const int step = range.start + (sources().reversed ? range.count - 1 - number : number);
      pixels(which)[lane()] = p.column_order ? step % p.height * p.width + step / p.height : step;
    }
    __syncwarp();
  }

  // The group's channels of a map, `stride` elements from one pixel to the next, pixel t to place(t); zeros beyond.
  template <typename E, typename Places>
  __device__ __forceinline__ void copy_map(const Args& p, const E* map, int stride, int count, int which,
                                           Places place) const {
    constexpr int values = 16 / sizeof(E), lanes = 32 / values, rows = 32 / lanes;
    const int channels = sources().channels;
    if (p.channels % kPart == 0) {
      const int part = lane() % lanes * values;
      const bool inside = part < channels;
      const E* from = map + (inside ? part : 0);
#pragma unroll
      for (int first = 0; first < kTile; first += rows) {
        const int t = first + lane() / lanes;
        if (first + rows <= kTile || t < kTile) {
          const int64_t offset = static_cast<int64_t>(pixels(which)[t]) * stride;
          copy_async<16>(place(t) + part, from + offset, inside && t < count);
        }
      }
    } else {
#pragma unroll 1
      for (int t = 0; t < kTile; ++t) {
        const bool valid = lane() < channels && t < count;
        const int64_t offset = static_cast<int64_t>(pixels(which)[t]) * stride + lane();
        place(t)[lane()] = valid ? map[offset] : narrow<E>(0.f);
      }
    }
  }

  // Begin to copy what a scan needs of a range: the group's channels of `map`, the projections, u if dt is projected.
  __device__ __forceinline__ void fetch(const Args& p, const TileRange& range, int which, const void* map) const {
    locate(p, range, which);
    copy_map(p, static_cast<const T*>(map) + sources().map, p.channels, range.count, which,
             [&](int t) { return piece<T>(0) + t * 32; });
    constexpr int lanes = 8 * 8 / kAligned, rows = 32 / lanes;  // that move a row
    const int number = columns(p), column = lane() % lanes * kAligned;
    if (column < number) {
      const T* from = static_cast<const T*>(p.projections) + sources().rows + first_column(p) + column;
#pragma unroll
      for (int first = 0; first < kTile; first += rows) {
        const int t = first + lane() / lanes;
        const int64_t offset = static_cast<int64_t>(pixels(which)[t]) * (4 * p.columns);
        copy_async<16>(raw_row(t, number) + column, from + offset, t < range.count);
      }
    }
    if (p.u != nullptr) {
      copy_map(p, static_cast<const T*>(p.u) + sources().maps, 4 * p.channels, range.count, which,
               [&](int t) { return raw_u(t); });
    }
  }

  // ---- what a step reads
  // From the pieces to steps of `count` pixels. The second of a step's two values is the drive, of x, or (`Product`
  // false) the value itself. `copy` begins to copy what is needed after that.
  template <bool Product, typename Copy>
  __device__ __forceinline__ void convert(const Args& p, int count, Copy copy) const {
    wait_for_copies();
    __syncwarp();
    copy();
    const int number = columns(p), dt_columns = fused_columns(p), column = lane() % 8 * kPart;
    if (column < number) {
      const bool is_dt = column < dt_columns;
      float* to = is_dt ? base + kTileOut + column : row(0) + column - dt_columns;
      const int stride = is_dt ? dt_columns : kWidth;
#pragma unroll
      for (int first = 0; first < kTile; first += 4) {
        const int t = first + lane() / 8;
        float values[kPart];
        load(static_cast<const T*>(raw_row(t, number) + column), values);
        store(to + t * stride, values);
      }
    }
    __syncwarp();

    float u[kTile];
    step_sizes(p, u);
    Floats<2>* own = steps(0) + lane();
    const bool active = lane() < sources().channels;
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      const float d2 = active && t < count ? softplus2<T>(u[t]) : 0.f;
      const float x = widen(piece<T>(0)[t * 32 + lane()]);
      own[t * 32] = Floats<2>{d2, Product ? d2 * x : x};
    }
    __syncwarp();
  }
  __device__ __forceinline__ Floats<2>* steps(int t) const { return reinterpret_cast<Floats<2>*>(base) + t * 32; }

  // u2 of the lane's channel, from u without bias, or from dt.
  __device__ __forceinline__ void step_sizes(const Args& p, float (&u)[kTile]) const {
    const float bias = p.bias[sources().bias + lane()];
#pragma unroll
    for (int t = 0; t < kTile; ++t) u[t] = bias;
    if (p.u != nullptr) {
#pragma unroll
      for (int t = 0; t < kTile; ++t) u[t] += widen(raw_u(t)[lane()]);
    } else {
      const float* weight = p.dt_weight + sources().weight + lane();
#pragma unroll 1
      for (int r = 0; r < p.dt_columns; r += kDtStep) {
        float w[kDtStep];
#pragma unroll
        for (int i = 0; i < kDtStep; ++i) w[i] = weight[(r + i) * p.padded];
        const float* from = base + kTileOut + r;
#pragma unroll
        for (int t = 0; t < kTile; ++t, from += p.dt_columns) {
          float dt[kDtStep];
          load(from, dt);
#pragma unroll
          for (int i = 0; i < kDtStep; ++i) u[t] = fmaf(w[i], dt[i], u[t]);
        }
      }
    }
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

  // Values of the thread's channels, of 32 at `from`.
  template <typename E> __device__ __forceinline__ void read(const E* from, E (&values)[kChannels]) const {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) values[j] = from[channel(j)];
  }
  template <typename T> __device__ __forceinline__ Vector B(const Tile<T, N>& tile, int t) const {
    return *reinterpret_cast<const Vector*>(tile.row(t) + share * kStates);
  }
  template <typename T> __device__ __forceinline__ Vector C(const Tile<T, N>& tile, int t) const {
    return *reinterpret_cast<const Vector*>(tile.row(t) + N + share * kStates);
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
  template <bool WithOutput, typename T>
  __device__ __forceinline__ void step(const Tile<T, N>& tile, int t, float (&h)[N], float (&y)[kChannels]) const {
    Floats<2> steps[kChannels];
    read(tile.steps(t), steps);
    const Vector b = B(tile, t);
    Vector c;
    if constexpr (WithOutput) c = C(tile, t);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const float d2 = steps[j].v[0], drive = steps[j].v[1];
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        float& state = h[j * kStates + i];
        state = fmaf(exp2_fast(A[j * kStates + i] * d2), state, drive * b.v[i]);
        if constexpr (WithOutput) y[j] = i == 0 ? c.v[i] * state : fmaf(c.v[i], state, y[j]);
      }
    }
  }
};

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

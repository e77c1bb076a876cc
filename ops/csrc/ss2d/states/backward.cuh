// Backward scan kernels of the fused SS2D core for N = 2 to 16 states a channel; the plan is in states/warp.cuh.
//
// With g_t = dL/dh_t: g_t = C_t dy_t + s_{t+1}, s_t = decay_t g_t; s runs against the scan.
//
// BackwardKernel: a block is several groups of channels on both routes of a pair. A warp takes the segments of its
//   route from the last to the first, and of each the tiles likewise: it scans from the segment's saved states to the
//   tile, through the tile leaving the states before every second step in shared memory (a *checkpoint*), then walks
//   back two steps at a time. Within two steps all is made of the checkpoint, a state after the other, so a thread
//   holds just s, A and dA of its states: 2.5 exponentials a state and step, and (N = 16) about 500 instructions a
//   step, 126 clocks of a processor a warp, which decide.
//   Sums over states go by shuffles to the lane of the channel; sums over the warp's channels (dB, dC) by exchanges
//   that leave each lane with other sums, then over the block's groups by shared memory, where the checkpoints were.
//   Moves: x and the projections 1.5 times a route, dy, states, du2 once a route, dx as y in forward, dB and dC once,
//   or a part for each block of groups.
// BackwardCarriesKernel: what a block does to s: its end, and the sum of d2.
#pragma once

#include "common/barrier.cuh"
#include "ss2d/states/warp.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

// Sum each of Count values over the lanes that differ in Bit, 2 * Bit and so on up to 16, exchanging halves while a
// lane has several. Returns the number of the value that is left first.
template <int Count, int Bit> __device__ __forceinline__ int add_lanes(float* values, int lane, int number = 0) {
  if constexpr (Bit == 32) {
    return number;
  } else if constexpr (Count == 1) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], Bit);
    return add_lanes<1, 2 * Bit>(values, lane, number);
  } else {
    constexpr int half = Count / 2;
    const bool upper = lane & Bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, Bit);
    }
    return add_lanes<half, 2 * Bit>(values, lane, number + (upper ? half : 0));
  }
}

// Two neighbouring steps of the walk back. The first is the earlier one of the scan.
template <typename T, int N> struct TwoSteps {
  static constexpr int kStates = Split<N>::kStates, kChannels = Split<N>::kChannels;
  // dB and dC of both steps, and how many of them a lane is left with, by how many lanes.
  static constexpr int kSums = 4 * kStates, kSharing = 32 / kChannels;
  static constexpr int kLeft = kSums > kSharing ? kSums / kSharing : 1;

  // Walk back from s after to s before. Adds to dA and dD; leaves in the tile dx in place of x (with `skip` times dy),
  // du2 in place of dy, and dB and dC of both steps, [2][2N], at `sums`. Returns the lane's du2.
  __device__ __forceinline__ static float run(const Place& at, const Thread<N>& thread, const Tile& tile, int t,
                                              const float* checkpoint, float skip, float (&s)[N], float (&dA)[N],
                                              float& dD, float* sums) {
    float d2[2][kChannels], x[2][kChannels], dy[2][kChannels], with_B[2][kChannels], with_A[2][kChannels];
    typename Thread<N>::Vector B[2], C[2];
    float reduced[kSums];  // [2][dB and dC][kStates]
    clear(reduced);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      thread.read(tile.base + kTileStepSizes, t + k, d2[k]);
      thread.read(tile.base + kTileX, t + k, x[k]);
      thread.read(tile.base + kTileOut, t + k, dy[k]);
      B[k] = thread.B(tile, t + k), C[k] = thread.C(tile, t + k);
      clear(with_B[k]);
      clear(with_A[k]);
    }
    const float own_x[2] = {x[0][0], x[1][0]};
    float before[N];
    Thread<N>::load(checkpoint, before);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const float drive0 = d2[0][j] * x[0][j], drive1 = d2[1][j] * x[1][j];
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int n = j * kStates + i;
        const float A = thread.A[n], decay0 = exp2_fast(A * d2[0][j]), decay1 = exp2_fast(A * d2[1][j]);
        // decay times the state before, and the state after
        const float carried0 = decay0 * before[n], h0 = fmaf(drive0, B[0].v[i], carried0);
        const float carried1 = decay1 * h0, h1 = fmaf(drive1, B[1].v[i], carried1);
        const float g1 = fmaf(C[1].v[i], dy[1][j], s[n]), s1 = decay1 * g1;
        const float g0 = fmaf(C[0].v[i], dy[0][j], s1);
        s[n] = decay0 * g0;
        reduced[i] = fmaf(g0, drive0, reduced[i]);
        reduced[kStates + i] = fmaf(h0, dy[0][j], reduced[kStates + i]);
        reduced[2 * kStates + i] = fmaf(g1, drive1, reduced[2 * kStates + i]);
        reduced[3 * kStates + i] = fmaf(h1, dy[1][j], reduced[3 * kStates + i]);
        with_B[0][j] = fmaf(g0, B[0].v[i], with_B[0][j]);
        with_B[1][j] = fmaf(g1, B[1].v[i], with_B[1][j]);
        const float through0 = g0 * carried0, through1 = g1 * carried1;
        with_A[0][j] = fmaf(A, through0, with_A[0][j]);
        with_A[1][j] = fmaf(A, through1, with_A[1][j]);
        dA[n] = fmaf(d2[0][j], through0, fmaf(d2[1][j], through1, dA[n]));
      }
    }

    const int first = add_lanes<kSums, kChannels>(reduced, at.lane);
    __syncwarp();                       // all lanes have read the steps and the checkpoint
    if (at.lane < kSums * kChannels) {  // the others have the same sums
#pragma unroll
      for (int i = 0; i < kLeft; ++i) {
        const int number = first + i, kind = number / kStates, state = number % kStates;
        sums[kind * N + thread.share * kStates + state] = reduced[i];
      }
    }
    float total = 0.f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Thread<N>::add_shares(with_B[k]);
      Thread<N>::add_shares(with_A[k]);
      const int own = (t + k) * 32 + at.lane;
      const float du = fmaf(own_x[k], with_B[k][0], kLn2 * with_A[k][0]) * softplus2_slope<T>(d2[k][0]);
      total += du;
      tile.base[kTileX + own] = fmaf(d2[k][0], with_B[k][0], skip * dy[k][0]);
      tile.base[kTileOut + own] = du;
      dD = fmaf(own_x[k], dy[k][0], dD);
    }
    return total;
  }
};

template <typename T, int N> struct BackwardKernel {
  static constexpr int kThreads = 64 * kMaxGroups, kBlocks = 1;
  static constexpr int kCheckpoint = N * 32;  // floats

  static __device__ __forceinline__ int own_floats(const Args& p) { return tile_floats(N, fused_rank(p)); }
  static __device__ __forceinline__ int warp_floats(const Args& p) { return own_floats(p) + checkpoint_floats(N); }

  static __device__ __forceinline__ void run(const Args& p) {
    const Place at(p, p.splits, p.block_groups);
    const Thread<N> thread(p, at);
    const Tile tile(p, threadIdx.x / 32, warp_floats(p), row_width(N, fused_rank(p)));
    float* checkpoints = tile.base + own_floats(p);
    const float skip = p.skip[at.padded_channel(p)];
    const int64_t row = (at.batch * p.chain + at.block) * 2 + at.route;
    float s[N], dA[N], dbias = 0.f, dD = 0.f;
    clear(dA);
    if (p.carries != nullptr && at.exists(p)) {
      Thread<N>::load(p.carries + at.template states_at<N>(p, row), s);
    } else {
      clear(s);
    }

    const Walk walk(p, at, true);
    for (int turn = 0; turn < walk.turns(); ++turn) {
      walk.meet(turn);
      const int segment = walk.segment(turn);
      if (segment < 0) continue;
      const int number = at.first + segment, start = number * kSegment, count = min(kSegment, p.length - start);
      const bool adds = p.pair == 1 || walk.second(turn);
      for (int i = (count - 1) / kTile; i >= 0; --i) {
        float h[N];
        clear(h);
        if (at.exists(p)) {
          Thread<N>::load(p.states + at.template states_at<N>(p, (at.batch * p.segments + number) * 4 + at.q), h);
        }
        for (int before = 0; before < i; ++before) {
          const TileRange range(at.reversed, before, start, count);
          tile.template load_steps<T>(p, at, range.start, range.count, p.x, kTileX);
          scan(at, thread, tile, range.count, h);
        }
        const TileRange range(at.reversed, i, start, count);
        load_dy(p, at, range, tile);
        run_tile(at, thread, tile, checkpoints, range.count, adds ? 0.f : skip, h, s, dA, dbias, dD);
        store(p, at, tile, checkpoints, range.count, adds);
      }
    }
    leave_sums(p, at, thread, row, dA, dbias, dD);
  }

  static __device__ __forceinline__ void load_dy(const Args& p, const Place& at, const TileRange& range,
                                                 const Tile& tile) {
    tile.template load_steps<T>(p, at, range.start, range.count, p.x, kTileX);
    const T* dy = static_cast<const T*>(p.dy) + at.batch * p.length * p.channels;
    tile.load_map(p, at, dy, p.channels, range.count, kTileOut);
    __syncwarp();
  }

  static __device__ __forceinline__ void scan(const Place& at, const Thread<N>& thread, const Tile& tile, int count,
                                              float (&h)[N]) {
    float none[Split<N>::kChannels];
    for (int first = 0; first < count; first += kSteps) {
#pragma unroll
      for (int t = first; t < first + kSteps; ++t) thread.template step<false>(tile, t, h, none);
    }
  }

  // A tile of `count` steps: h enters it, s comes from behind it. An odd number has an inert step more.
  static __device__ __forceinline__ void run_tile(const Place& at, const Thread<N>& thread, const Tile& tile,
                                                  float* checkpoints, int count, float skip, float (&h)[N],
                                                  float (&s)[N], float (&dA)[N], float& dbias, float& dD) {
    const int twos = (count + 1) / 2, own = at.lane * Split<N>::kStates;
    float none[Split<N>::kChannels];
    Thread<N>::store(checkpoints + own, h);
#pragma unroll 1
    for (int i = 1; i < twos; ++i) {
      thread.template step<false>(tile, 2 * i - 2, h, none);
      thread.template step<false>(tile, 2 * i - 1, h, none);
      Thread<N>::store(checkpoints + i * kCheckpoint + own, h);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = twos - 1; i >= 0; --i) {
      float* checkpoint = checkpoints + i * kCheckpoint;
      dbias += TwoSteps<T, N>::run(at, thread, tile, 2 * i, checkpoint + own, skip, s, dA, dD, checkpoint);
    }
    __syncwarp();
  }

  // dx and du2 of the lane's channel; dB and dC of the tile, summed over the block's groups in their order.
  static __device__ __forceinline__ void store(const Args& p, const Place& at, const Tile& tile,
                                               const float* checkpoints, int count, bool adds) {
    const int64_t image = at.batch * p.length;
    tile.store_map(p, at, static_cast<T*>(p.y) + image * p.channels, p.channels, count, kTileX, adds);
    T* du = static_cast<T*>(p.du) + (image * 4 + at.q) * p.channels;
    tile.store_map(p, at, du, 4 * p.channels, count, kTileOut, false);

    const int groups = p.block_groups, threads = 32 * groups, stride = warp_floats(p);
    const float* first = checkpoints - (threadIdx.x / 32 - at.route * groups) * stride;
    barrier_of(1 + at.route, threads);
    const int width = p.parts != nullptr ? 2 * N : p.columns - p.dt_columns;
    for (int i = threadIdx.x - at.route * threads; i < count * width; i += threads) {
      const int t = i / width, column = i % width;
      float sum = 0.f;
      if (column < 2 * N) {
        const float* from = first + t / 2 * kCheckpoint + t % 2 * 2 * N + column;
        for (int g = 0; g < groups; ++g) sum += from[g * stride];
      }
      const int64_t pixel = (image + tile.pixels()[t]) * 4 + at.q;
      if (p.parts != nullptr) {
        const int64_t split = blockIdx.x / p.chain % p.splits;
        p.parts[(split * p.batch * p.length * 4 + pixel) * width + column] = sum;
      } else {
        static_cast<T*>(p.dprojections)[pixel * p.columns + p.dt_columns + column] = narrow<T>(sum);
      }
    }
    barrier_of(1 + at.route, threads);
  }

  static __device__ __forceinline__ void leave_sums(const Args& p, const Place& at, const Thread<N>& thread,
                                                    int64_t row, const float (&dA)[N], float dbias, float dD) {
    if (!at.exists(p)) return;
    float* to = p.partial + row * (N + 2) * p.padded + at.group * 32;
    constexpr int states = Split<N>::kStates;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      to[(thread.share * states + n % states) * p.padded + thread.channel(n / states)] = dA[n];
    }
    to[N * p.padded + at.lane] = dbias;
    to[(N + 1) * p.padded + at.lane] = dD;
  }
};

template <typename T, int N> struct BackwardCarriesKernel {
  static constexpr int kThreads = 64, kBlocks = 8;

  static __device__ __forceinline__ void run(const Args& p) {
    const Place at(p, p.groups, 1);
    const Thread<N> thread(p, at);
    const Tile tile(p, at.route, tile_floats(N, fused_rank(p)), row_width(N, fused_rank(p)));
    float s[N], sum = 0.f;
    clear(s);
    const Walk walk(p, at, true);
    for (int turn = 0; turn < walk.turns(); ++turn) {
      const int segment = walk.segment(turn);
      if (segment < 0) continue;
      const int start = (at.first + segment) * kSegment, count = min(kSegment, p.length - start);
      for (int i = (count - 1) / kTile; i >= 0; --i) {
        const TileRange range(at.reversed, i, start, count);
        tile.template load_steps<T>(p, at, range.start, range.count, p.dy, kTileOut);
        run_tile(at, thread, tile, range.count, s, sum);
      }
    }
    const int64_t row = (at.batch * p.chain + at.block) * 2 + at.route;
    Thread<N>::store(p.carries + at.template states_at<N>(p, row), s);
    p.sums[row * p.padded + at.channel] = sum;
  }

  static __device__ __forceinline__ void run_tile(const Place& at, const Thread<N>& thread, const Tile& tile, int count,
                                                  float (&s)[N], float& sum) {
    constexpr int states = Split<N>::kStates;
    for (int first = (count - 1) / kSteps * kSteps; first >= 0; first -= kSteps) {
#pragma unroll
      for (int t = first + kSteps - 1; t >= first; --t) {
        float d2[Split<N>::kChannels], dy[Split<N>::kChannels];
        thread.read(tile.base + kTileStepSizes, t, d2);
        thread.read(tile.base + kTileOut, t, dy);
        const auto C = thread.C(tile, t);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const int j = n / states;
          s[n] = exp2_fast(thread.A[n] * d2[j]) * fmaf(C.v[n % states], dy[j], s[n]);
        }
        sum += d2[0];
      }
    }
  }
};

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

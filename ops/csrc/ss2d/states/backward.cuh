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
#pragma once

#include "common/barrier.cuh"
#include "ss2d/states/tile.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

// Sums over the lanes of a warp by shared memory: a lane leaves its 4 kStates values, dB and dC of two steps, in a slot
// of a checkpoint, then adds up four of them over some lanes.
template <int N> struct Slots {
  static constexpr int kStates = Split<N>::kStates, kChannels = Split<N>::kChannels, kSlot = 4 * kStates;

  // Where the `number`-th four of a lane are: so that neither lanes' writing nor reading them meets in a bank.
  static __device__ __forceinline__ int at(int lane, int number) {
    return lane * kSlot + 4 * (number ^ (kStates == 4 ? lane / 2 % 4 : lane / 4 % 2));
  }
  static __device__ __forceinline__ void load_states(const float* checkpoint, int lane, float (&h)[N]) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const auto vector = *reinterpret_cast<const Floats<kStates>*>(checkpoint + at(lane, j));
#pragma unroll
      for (int i = 0; i < kStates; ++i) h[j * kStates + i] = vector.v[i];
    }
  }
  static __device__ __forceinline__ void store_states(float* checkpoint, int lane, const float (&h)[N]) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      Floats<kStates> vector;
#pragma unroll
      for (int i = 0; i < kStates; ++i) vector.v[i] = h[j * kStates + i];
      *reinterpret_cast<Floats<kStates>*>(checkpoint + at(lane, j)) = vector;
    }
  }

  // From each lane's values, [dB0, dC0, dB1, dC1][kStates], to two parts of the sums of the warp, [2][4][N], at the
  // checkpoint, of which the lanes have read their own states.
  static __device__ __forceinline__ void sum(float* checkpoint, int lane, const float (&values)[4 * kStates]) {
#pragma unroll
    for (int number = 0; number < kStates; ++number) {
      *reinterpret_cast<Floats<4>*>(checkpoint + at(lane, number)) =
          Floats<4>{values[4 * number], values[4 * number + 1], values[4 * number + 2], values[4 * number + 3]};
    }
    __syncwarp();
    const int number = lane % kStates, share = lane / kStates % kChannels, part = lane / N;
    Floats<4> sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int other = kChannels * (part * kStates + i) + share;
      const auto value = *reinterpret_cast<const Floats<4>*>(checkpoint + at(other, number));
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.v[k] = i == 0 ? value.v[k] : sum.v[k] + value.v[k];
    }
#pragma unroll
    for (int distance = 16; distance > N; distance /= 2) {  // from 32 / N parts to two
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.v[k] += __shfl_xor_sync(kAllLanes, sum.v[k], distance);
    }
    __syncwarp();
    const int column = kStates == 4 ? number * N + share * 4 : number * 4;
    if (part < 2) *reinterpret_cast<Floats<4>*>(checkpoint + part * 4 * N + column) = sum;
  }
  // One of them, of `column` 0 to 2N of dB and dC of the first or second step.
  static __device__ __forceinline__ float part_sums(const float* checkpoint, int second, int column) {
    return checkpoint[second * 2 * N + column] + checkpoint[4 * N + second * 2 * N + column];
  }
  static_assert(8 * N <= kSumFloats && 32 * kSlot <= kCheckpoint, "of layout.h");
};

// Two neighbouring steps of the walk back. The first is the earlier one of the scan.
template <typename T, int N> struct TwoSteps {
  static constexpr int kStates = Split<N>::kStates, kChannels = Split<N>::kChannels;

  // Walk back from s after to s before. Adds to dA; leaves dx (with `skip` times dy) and du2 in place of the lane's
  // own steps, and sums of dB and dC in place of the checkpoint. Returns the lane's du2.
  __device__ __forceinline__ static float run(const Thread<N>& thread, const Tile<T, N>& tile, const T* xs, int t,
                                              float* checkpoint, float skip, float (&s)[N], float (&dA)[N]) {
    float with_B[2][kChannels], with_A[2][kChannels], own_d2[2], own_dy[2];
    typename Thread<N>::Vector B[2], C[2];
    float reduced[4 * kStates];  // [2][dB and dC][kStates]
#pragma unroll
    for (int k = 0; k < 2; ++k) B[k] = thread.B(tile, t + k), C[k] = thread.C(tile, t + k);
    float before[N];
    Slots<N>::load_states(checkpoint, thread.lane, before);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int channel = thread.channel(j);
      const auto step0 = tile.steps(t)[channel], step1 = tile.steps(t + 1)[channel];
      const float dy0 = tile.base[kTileOut + t * 32 + channel], dy1 = tile.base[kTileOut + t * 32 + 32 + channel];
      const float d20 = step0.v[0], d21 = step1.v[0], drive0 = step0.v[1], drive1 = step1.v[1];
      if (j == 0) own_d2[0] = d20, own_d2[1] = d21, own_dy[0] = dy0, own_dy[1] = dy1;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int n = j * kStates + i;
        const float A = thread.A[n], decay0 = exp2_fast(A * d20), decay1 = exp2_fast(A * d21);
        // decay times the state before, and the state after
        const float carried0 = decay0 * before[n], h0 = fmaf(drive0, B[0].v[i], carried0);
        const float carried1 = decay1 * h0, h1 = fmaf(drive1, B[1].v[i], carried1);
        const float g1 = fmaf(C[1].v[i], dy1, s[n]), s1 = decay1 * g1;
        const float g0 = fmaf(C[0].v[i], dy0, s1);
        s[n] = decay0 * g0;
        const float through0 = g0 * carried0, through1 = g1 * carried1;
        add(reduced[i], g0, drive0, j == 0);
        add(reduced[kStates + i], h0, dy0, j == 0);
        add(reduced[2 * kStates + i], g1, drive1, j == 0);
        add(reduced[3 * kStates + i], h1, dy1, j == 0);
        add(with_B[0][j], g0, B[0].v[i], i == 0);
        add(with_B[1][j], g1, B[1].v[i], i == 0);
        add(with_A[0][j], A, through0, i == 0);
        add(with_A[1][j], A, through1, i == 0);
        dA[n] = fmaf(d20, through0, fmaf(d21, through1, dA[n]));
      }
    }

    Slots<N>::sum(checkpoint, thread.lane, reduced);  // all lanes have read the steps
    float total = 0.f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Thread<N>::add_shares(with_B[k]);
      Thread<N>::add_shares(with_A[k]);
      const float x = widen(xs[(t + k) * 32 + thread.lane]);
      const float du = fmaf(x, with_B[k][0], kLn2 * with_A[k][0]) * softplus2_slope<T>(own_d2[k]);
      total += du;
      tile.steps(t + k)[thread.lane] = Floats<2>{fmaf(own_d2[k], with_B[k][0], skip * own_dy[k]), du};
    }
    return total;
  }
  __device__ __forceinline__ static void add(float& sum, float a, float b, bool first) {
    sum = first ? a * b : fmaf(a, b, sum);
  }
};

template <typename T, int N> struct BackwardKernel {
  static constexpr int kThreads = 64 * kMaxGroups, kBlocks = 1;
  static constexpr int kWarpFloats = backward_warp_bytes(N, sizeof(T)) / 4;
  using Steps = Tile<T, N>;

  // What a warp has of a channel.
  struct State {
    float s[N], dA[N], dbias = 0.f, dD = 0.f;
  };

  static __device__ __forceinline__ void run(const Args& p) {
    const Place at(p, p.splits, p.block_groups);
    const Thread<N> thread(p, at);
    float* memory = shared_memory<float>() + threadIdx.x / 32 * kWarpFloats;
    float* checkpoints = memory + tile_floats(N);
    T* xs = reinterpret_cast<T*>(checkpoints + kCheckpoints * kCheckpoint);
    float* pieces = checkpoints + (kCheckpoints - 1) * kCheckpoint + kSumFloats;  // the first, and back from there
    const Steps tile(reinterpret_cast<char*>(memory), reinterpret_cast<char*>(pieces), -4 * kCheckpoint);
    const float skip = p.skip[at.padded_channel(p)];
    tile.leave_sources(p, at);
    State own;
    clear(own.dA);
    if (p.carries != nullptr && at.exists(p)) {
      const int64_t row = (at.batch * p.chain + at.block) * 2 + at.route;
      Thread<N>::load(p.carries + at.template states_at<N>(p, row), own.s);
    } else {
      clear(own.s);
    }

    const Walk walk(p, at, true);
    const Tiles tiles(p, at);
    const int first_segment = at.first;
    const bool reversed = at.reversed;
    int which = 0;
    fetch_first(p, first_segment, tile, tiles, walk.nth(0), which);
    for (int turn = 0; turn < walk.turns(); ++turn) {
      walk.meet(turn);
      const int segment = walk.segment(turn);
      if (segment < 0) continue;
      const bool adds = p.pair == 1 || walk.second(turn);
      const int number = first_segment + segment, first = number * kSegmentTiles, in_segment = tiles.of_segment(number);
      const auto enter = [&] { copy_states(p, tile, segment, checkpoints); };
      if (in_segment == 2) {  // to the second tile
        const TileRange range = tiles.range(first + reversed);
        tile.template convert<true>(p, range.count, enter);
        which ^= 1;
        scan(thread, tile, range.count, checkpoints,
             [&] { fetch(p, tile, tiles.range(first + !reversed), which, true); });
      }
#pragma unroll 1
      for (int left = in_segment; left > 0; --left) {
        // the earlier of the segment's tiles is the last
        const TileRange range = tiles.range(first + (left == 2 ? !reversed : in_segment == 2 && reversed));
        tile.template convert<true>(p, range.count, [&] {
          if (left == 1) enter();
        });
        load_dy(tile, xs, own.dD);
        const auto fetch_next = [&] {
          if (left == 2) {
            fetch(p, tile, tiles.range(first + reversed), which ^ 1, true);
          } else {
            fetch_first(p, first_segment, tile, tiles, walk.following(turn), which ^ 1);
          }
        };
        const auto fetch_before = [&] {
          if (adds && p.channels % kPart == 0) {
            tile.copy_map(p, static_cast<const T*>(p.y) + tile.sources().map, p.channels, range.count, which,
                          [&](int t) { return tile.template piece<T>(kBeforeGradient) + t * 32; });
          }
        };
        run_tile(thread, tile, xs, checkpoints, range.count, adds ? 0.f : skip, own, fetch_next, fetch_before);
        store(p, tile, range.count, which, adds);
        store_sums(p, tile, checkpoints, range.count, which);
        which ^= 1;
      }
    }
    leave_sums(p, thread, tile, own);
  }

  // Begin to copy what enters a segment.
  static __device__ __forceinline__ void copy_states(const Args& p, const Steps& tile, int segment, float* checkpoint) {
    constexpr int states = Split<N>::kStates;
    const bool exists = tile.exists();
    const float* from = exists ? tile.states_of(p, segment) : p.states;
#pragma unroll
    for (int j = 0; j < N / states; ++j) {
      copy_async<4 * states>(checkpoint + Slots<N>::at(Steps::lane(), j), from + j * 32 * states, exists);
    }
  }

  static __device__ __forceinline__ void fetch(const Args& p, const Steps& tile, const TileRange& range, int which,
                                               bool with_dy) {
    tile.fetch(p, range, which, p.x);
    if (with_dy) {
      tile.copy_map(p, static_cast<const T*>(p.dy) + tile.sources().map, p.channels, range.count, which,
                    [&](int t) { return tile.template piece<T>(kGradientPiece) + t * 32; });
    }
  }
  // The tile that a segment of the block, if there is one, needs first.
  static __device__ __forceinline__ void fetch_first(const Args& p, int first_segment, const Steps& tile,
                                                     const Tiles& tiles, int segment, int which) {
    if (segment < 0) return;
    const int number = first_segment + segment, in_segment = tiles.of_segment(number);
    const bool second = in_segment == 2 && tile.sources().reversed;
    fetch(p, tile, tiles.range(number * kSegmentTiles + second), which, in_segment == 1);
  }

  // dy and x, each lane its own channel's.
  static __device__ __forceinline__ void load_dy(const Steps& tile, T* xs, float& dD) {
    const int lane = Steps::lane();
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      const T x = tile.template piece<T>(0)[t * 32 + lane];
      const float dy = widen(tile.template piece<T>(kGradientPiece)[t * 32 + lane]);
      xs[t * 32 + lane] = x;
      tile.base[kTileOut + t * 32 + lane] = dy;
      dD = fmaf(widen(x), dy, dD);
    }
    __syncwarp();
  }

  // From the first checkpoint over a tile to the next tile's first checkpoint.
  template <typename Next>
  static __device__ __forceinline__ void scan(const Thread<N>& thread, const Steps& tile, int count, float* checkpoint,
                                              Next fetch_next) {
    wait_for_copies();
    fetch_next();
    float h[N], none[Split<N>::kChannels];
    Slots<N>::load_states(checkpoint, thread.lane, h);
#pragma unroll 1
    for (int first = 0; first < count; first += kSteps) {
#pragma unroll
      for (int t = first; t < first + kSteps; ++t) thread.template step<false>(tile, t, h, none);
    }
    Slots<N>::store_states(checkpoint, thread.lane, h);
    __syncwarp();
  }

  // A tile of `count` steps: the first checkpoint enters it, s comes from behind it. An odd number has an inert step
  // more. When the last checkpoints are done with, what comes next is fetched to where they were.
  template <typename Next, typename Before>
  static __device__ __forceinline__ void run_tile(const Thread<N>& thread, const Steps& tile, const T* xs,
                                                  float* checkpoints, int count, float skip, State& own,
                                                  Next fetch_next, Before fetch_before) {
    const int twos = (count + 1) / 2;
    float h[N], none[Split<N>::kChannels];
    wait_for_copies();
    Slots<N>::load_states(checkpoints, thread.lane, h);
#pragma unroll 1
    for (int i = 1; i < twos; ++i) {
      thread.template step<false>(tile, 2 * i - 2, h, none);
      thread.template step<false>(tile, 2 * i - 1, h, none);
      Slots<N>::store_states(checkpoints + i * kCheckpoint, thread.lane, h);
    }
    int i = twos - 1;
#pragma unroll 1
    for (int last = 2; last >= 0; --last) {
      if (last == 1) fetch_next();
      if (last == 0) fetch_before();
#pragma unroll 1
      for (; i >= last; --i) {
        own.dbias += TwoSteps<T, N>::run(thread, tile, xs, 2 * i, checkpoints + i * kCheckpoint, skip, own.s, own.dA);
      }
    }
    wait_for_copies();
    __syncwarp();
  }

  // dx and du2 of the tile, from where the steps were.
  static __device__ __forceinline__ void store(const Args& p, const Steps& tile, int count, int which, bool adds) {
    T *dx = static_cast<T*>(p.y) + tile.sources().map, *du = static_cast<T*>(p.du) + tile.sources().maps;
    const int lane = Steps::lane(), channels = tile.sources().channels;
    if (p.channels % kPart == 0) {
      const int part = lane % 4 * kPart;
      if (part >= channels) return;
#pragma unroll
      for (int first = 0; first < kTile; first += 8) {
        const int t = first + lane / 4;
        if (t >= count) break;
        float both[2 * kPart], values[kPart], before[kPart];
        load(static_cast<const float*>(tile.base + (t * 32 + part) * 2), both);
        if (adds) {
          load(static_cast<const T*>(tile.template piece<T>(kBeforeGradient) + t * 32 + part), before);
        } else {
          clear(before);
        }
#pragma unroll
        for (int j = 0; j < kPart; ++j) values[j] = before[j] + both[2 * j];
        const int64_t offset = static_cast<int64_t>(tile.pixels(which)[t]) * p.channels;
        mmvmamba::store(dx + offset + part, values);
#pragma unroll
        for (int j = 0; j < kPart; ++j) values[j] = both[2 * j + 1];
        mmvmamba::store(du + 4 * offset + part, values);
      }
    } else if (lane < channels) {
#pragma unroll 1
      for (int t = 0; t < count; ++t) {
        const int64_t offset = static_cast<int64_t>(tile.pixels(which)[t]) * p.channels;
        const auto value = tile.steps(t)[lane];
        T* own = dx + offset + lane;
        *own = narrow<T>(value.v[0] + (adds ? widen(*own) : 0.f));
        du[4 * offset + lane] = narrow<T>(value.v[1]);
      }
    }
  }

  // dB and dC of the tile, summed over the block's groups in their order.
  static __device__ __forceinline__ void store_sums(const Args& p, const Steps& tile, const float* checkpoints,
                                                    int count, int which) {
    const int groups = p.block_groups, threads = 32 * groups, route = threadIdx.x >= threads;
    const int thread = threadIdx.x - route * threads;
    const float* first = checkpoints - thread / 32 * kWarpFloats;
    barrier_of(1 + route, threads);
    constexpr int width = Steps::kWidth;
    for (int i = thread; i < count * width; i += threads) {
      const int t = i / width, column = i % width;
      float sum = 0.f;
      if (column < 2 * N) {
        const float* from = first + t / 2 * kCheckpoint;
        for (int g = 0; g < groups; ++g) sum += Slots<N>::part_sums(from + g * kWarpFloats, t % 2, column);
      }
      const int64_t pixel = tile.pixels(which)[t];
      if (p.parts == nullptr) {
        static_cast<T*>(p.dprojections)[tile.sources().rows + pixel * (4 * p.columns) + p.dt_columns + column] =
            narrow<T>(sum);
      } else if (column < 2 * N) {
        p.parts[tile.sources().parts + pixel * (8 * N) + column] = sum;
      }
    }
    barrier_of(1 + route, threads);
  }

  static __device__ __forceinline__ void leave_sums(const Args& p, const Thread<N>& thread, const Steps& tile,
                                                    const State& own) {
    if (!tile.exists()) return;
    float* to = p.partial + tile.sources().partial;
    constexpr int states = Split<N>::kStates;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      to[(thread.share * states + n % states) * p.padded + thread.channel(n / states)] = own.dA[n];
    }
    to[N * p.padded + thread.lane] = own.dbias;
    to[(N + 1) * p.padded + thread.lane] = own.dD;
  }
};

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

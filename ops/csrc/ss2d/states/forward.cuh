// Forward scan kernels of the fused SS2D core for N = 2 to 16 states a channel; the plan is in states/warp.cuh.
//
// ForwardKernel: a block is one group of channels on both routes of a pair, two warps. A step of a thread and a state
//   is an exponential, two products and two multiply-adds: (N = 16) 17 exponentials and some 140 instructions with
//   all around them, which take 34 and 35 clocks of a processor a warp. So computing exponentials by polynomials as
//   well would gain nothing: it frees 2 clocks of the one for 2 of the other.
//   Moves: x twice a pair, projections once a group and route, y three times a pair (write, read, write; the second
//   pair reads it once more), states if training.
// CarriesKernel: the same without outputs, leaving what a block does to the state: its end, and the sum of d2.
#pragma once

#include "ss2d/states/tile.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

template <typename T, int N, bool WithOutput> struct ScanKernel {
  static constexpr int kThreads = 64, kBlocks = 8;
  using Steps = Tile<T, N>;

  static __device__ __forceinline__ void run(const Args& p) {
    const Place at(p, p.groups, 1);
    const Thread<N> thread(p, at);
    const int output_bytes = p.float_output ? 4 : sizeof(T);
    char* memory = shared_memory<char>() + at.route * forward_warp_bytes(N, sizeof(T), output_bytes);
    const Steps tile(memory, memory + 4 * tile_floats(N), piece_bytes(sizeof(T)));
    tile.leave_sources(p, at);
    const int64_t carry_row = (at.batch * p.chain + at.block) * 2 + at.route;
    float h[N], sum = 0.f;
    if (WithOutput && p.carries != nullptr) {
      Thread<N>::load(p.carries + at.template states_at<N>(p, carry_row), h);
    } else {
      clear(h);
    }

    const Walk walk(p, at, false);
    const Tiles tiles(p, at);
    int number = at.reversed ? tiles.end - 1 : tiles.begin, which = 0;
    tile.fetch(p, tiles.range(number), which, p.x);
    for (int turn = 0; turn < walk.turns(); ++turn) {
      if constexpr (WithOutput) walk.meet(turn);
      const int segment = walk.segment(turn);
      if (segment < 0) continue;
      if (WithOutput && p.states != nullptr) {
        Thread<N>::store(tile.states_of(p, segment), h);
      }
      const bool adds = p.pair == 1 || walk.second(turn);
      for (int left = tiles.of_segment(at.first + segment); left > 0; --left) {
        const TileRange range = tiles.range(number);
        number += at.reversed ? -1 : 1;
        tile.template convert<true>(p, range.count, [&] {
          if constexpr (WithOutput) fetch_before(p, tile, range.count, which, adds);
        });
        which ^= 1;
        if (tiles.have(number)) tile.fetch(p, tiles.range(number), which, p.x);
        run_tile(thread, tile, range.count, h, sum);
        __syncwarp();
        if constexpr (WithOutput) {
          if (p.float_output) {
            store<float>(p, tile, range.count, which ^ 1, adds);
          } else {
            store<T>(p, tile, range.count, which ^ 1, adds);
          }
        }
      }
    }
    if constexpr (!WithOutput) {
      Thread<N>::store(p.carries + at.template states_at<N>(p, carry_row), h);
      p.sums[carry_row * p.padded + at.channel] = sum;
    }
  }

  static __device__ __forceinline__ void run_tile(const Thread<N>& thread, const Steps& tile, int count, float (&h)[N],
                                                  float& sum) {
#pragma unroll 1
    for (int first = 0; first < count; first += kSteps) {
#pragma unroll
      for (int t = first; t < first + kSteps; ++t) {
        float y[Split<N>::kChannels];
        thread.template step<WithOutput>(tile, t, h, y);
        if constexpr (WithOutput) {
          Thread<N>::add_shares(y);
          tile.base[kTileOut + t * 32 + thread.lane] = y[0];
        } else {
          sum += tile.steps(t)[thread.lane].v[0];
        }
      }
    }
  }

  // Begin to copy what the outputs are added to: what is there, or x, which then is multiplied by D.
  static __device__ __forceinline__ void fetch_before(const Args& p, const Steps& tile, int count, int which,
                                                      bool adds) {
    if (p.channels % kPart != 0) return;  // `store` reads it
    if (adds && p.float_output) {
      tile.copy_map(p, static_cast<const float*>(p.y) + tile.sources().map, p.channels, count, which,
                    [&](int t) { return tile.template piece<float>(kBeforePiece) + t * 32; });
    } else {
      tile.copy_map(p, static_cast<const T*>(adds ? p.y : p.x) + tile.sources().map, p.channels, count, which,
                    [&](int t) { return tile.template piece<T>(kBeforePiece) + t * 32; });
    }
  }

  template <typename E>
  static __device__ __forceinline__ void store(const Args& p, const Steps& tile, int count, int which, bool adds) {
    wait_for_copies();
    __syncwarp();  // all lanes' copies are there
    const int lane = Steps::lane(), channels = tile.sources().channels;
    E* map = static_cast<E*>(p.y) + tile.sources().map;
    if (p.channels % kPart == 0) {
      const int part = lane % 4 * kPart;
      if (part >= channels) return;
#pragma unroll
      for (int first = 0; first < kTile; first += 8) {
        const int t = first + lane / 4;
        if (t >= count) break;
        float values[kPart], before[kPart];
        load(static_cast<const float*>(tile.base + kTileOut + t * 32 + part), values);
        if (adds) {
          load(static_cast<const E*>(tile.template piece<E>(kBeforePiece) + t * 32 + part), before);
#pragma unroll
          for (int j = 0; j < kPart; ++j) values[j] += before[j];
        } else {
          float skip[kPart];
          load(p.skip + tile.sources().skip(p) + part, skip);
          load(static_cast<const T*>(tile.template piece<T>(kBeforePiece) + t * 32 + part), before);
#pragma unroll
          for (int j = 0; j < kPart; ++j) values[j] = fmaf(skip[j], before[j], values[j]);
        }
        const int64_t offset = static_cast<int64_t>(tile.pixels(which)[t]) * p.channels;
        mmvmamba::store(map + offset + part, values);
      }
    } else if (lane < channels) {
      const float skip = p.skip[tile.sources().skip(p) + lane];
#pragma unroll 1
      for (int t = 0; t < count; ++t) {
        const int64_t offset = static_cast<int64_t>(tile.pixels(which)[t]) * p.channels + lane;
        const float value = tile.base[kTileOut + t * 32 + lane];
        map[offset] =
            narrow<E>(adds ? value + widen(map[offset])
                           : fmaf(skip, widen(static_cast<const T*>(p.x)[tile.sources().map + offset]), value));
      }
    }
  }
};
template <typename T, int N> using ForwardKernel = ScanKernel<T, N, true>;
template <typename T, int N> using CarriesKernel = ScanKernel<T, N, false>;

// A warp takes a group of one route and image: from the ends of blocks to what enters them, in their place.
template <int N> struct CombineKernel {
  static constexpr int kThreads = 32, kBlocks = 0;

  static __device__ __forceinline__ void run(const Args& p, bool first_reversed, bool second_reversed) {
    Args own = p;
    own.chain = 1;  // so that a block is an image
    const Place by_group(own, p.groups, 1);
    for (int route = 0; route < 2; ++route) {
      Place at = by_group;
      at.route = route, at.q = 2 * p.pair + route;
      const Thread<N> thread(p, at);
      const bool reversed = route == 0 ? first_reversed : second_reversed;
      float state[N];
      clear(state);
      for (int i = 0; i < p.chain; ++i) {
        const int block = reversed ? p.chain - 1 - i : i;
        const int64_t row = (at.batch * p.chain + block) * 2 + route;
        float end[N], d2[Split<N>::kChannels];
        float* to = p.carries + at.template states_at<N>(p, row);
        Thread<N>::load(to, end);
        thread.read(static_cast<const float*>(p.sums + row * p.padded + at.group * 32), d2);
        Thread<N>::store(to, state);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          state[j] = fmaf(exp2_fast(thread.A[j] * d2[j / Split<N>::kStates]), state[j], end[j]);
        }
      }
    }
  }
};

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

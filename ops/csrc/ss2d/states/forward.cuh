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

#include "ss2d/states/warp.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

template <typename T, int N, bool WithOutput> struct ScanKernel {
  static constexpr int kThreads = 64, kBlocks = 8;

  static __device__ __forceinline__ void run(const Args& p) {
    const Place at(p, p.groups, 1);
    const Thread<N> thread(p, at);
    const int width = row_width(N, fused_rank(p));
    const Tile tile(p, at.route, tile_floats(N, fused_rank(p)), width);
    const float skip = p.skip[at.channel];
    const int64_t carry_row = (at.batch * p.chain + at.block) * 2 + at.route;
    float h[N], sum = 0.f;
    if (WithOutput && p.carries != nullptr) {
      Thread<N>::load(p.carries + at.template states_at<N>(p, carry_row), h);
    } else {
      clear(h);
    }

    const Walk walk(p, at, false);
    for (int turn = 0; turn < walk.turns(); ++turn) {
      if constexpr (WithOutput) walk.meet(turn);
      const int segment = walk.segment(turn);
      if (segment < 0) continue;
      const int number = at.first + segment, start = number * kSegment, count = min(kSegment, p.length - start);
      if (WithOutput && p.states != nullptr) {
        Thread<N>::store(p.states + at.template states_at<N>(p, (at.batch * p.segments + number) * 4 + at.q), h);
      }
      const bool adds = p.pair == 1 || walk.second(turn);
      for (int i = 0; i * kTile < count; ++i) {
        const TileRange range(at.reversed, i, start, count);
        tile.template load_steps<T>(p, at, range.start, range.count, p.x, kTileX);
        run_tile(at, thread, tile, range.count, adds ? 0.f : skip, h, sum);
        if constexpr (WithOutput) {
          if (p.float_output) {
            store<float>(p, at, tile, range.count, adds);
          } else {
            store<T>(p, at, tile, range.count, adds);
          }
        }
      }
    }
    if constexpr (!WithOutput) {
      Thread<N>::store(p.carries + at.template states_at<N>(p, carry_row), h);
      p.sums[carry_row * p.padded + at.channel] = sum;
    }
  }

  // y takes `skip` times x besides.
  static __device__ __forceinline__ void run_tile(const Place& at, const Thread<N>& thread, const Tile& tile, int count,
                                                  float skip, float (&h)[N], float& sum) {
    for (int first = 0; first < count; first += kSteps) {
#pragma unroll
      for (int t = first; t < first + kSteps; ++t) {
        float y[Split<N>::kChannels];
        const float x = thread.template step<WithOutput>(tile, t, h, y);
        if constexpr (WithOutput) {
          Thread<N>::add_shares(y);
          tile.base[kTileOut + t * 32 + at.lane] = fmaf(skip, x, y[0]);
        } else {
          sum += tile.base[kTileStepSizes + t * 32 + at.lane];
        }
      }
    }
    __syncwarp();
  }

  template <typename E>
  static __device__ __forceinline__ void store(const Args& p, const Place& at, const Tile& tile, int count, bool adds) {
    E* map = static_cast<E*>(p.y) + at.batch * p.length * p.channels;
    tile.store_map(p, at, map, p.channels, count, kTileOut, adds);
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
        thread.read(p.sums + row * p.padded + at.group * 32, 0, d2);
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

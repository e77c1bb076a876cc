// Carries of the adjoint of the fused SS2D core for N = 2 to 16 states a channel, for images that are chains of blocks.
//
// BackwardCarriesKernel: what a block does to s, of states/backward.cuh: its end, and the sum of d2.
#pragma once

#include "ss2d/states/tile.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

template <typename T, int N> struct BackwardCarriesKernel {
  static constexpr int kThreads = 64, kBlocks = 8;

  static __device__ __forceinline__ void run(const Args& p) {
    const Place at(p, p.groups, 1);
    const Thread<N> thread(p, at);
    char* memory = shared_memory<char>() + at.route * forward_warp_bytes(N, sizeof(T), sizeof(T));
    const Tile<T, N> tile(memory, memory + 4 * tile_floats(N), piece_bytes(sizeof(T)));
    tile.leave_sources(p, at);
    float s[N], sum = 0.f;
    clear(s);
    const Tiles tiles(p, at);
    const int step = at.reversed ? 1 : -1;
    int number = at.reversed ? tiles.begin : tiles.end - 1, which = 0;
    tile.fetch(p, tiles.range(number), which, p.dy);
    for (; tiles.have(number); number += step) {
      const int count = tiles.range(number).count;
      tile.template convert<false>(p, count, [] {});
      which ^= 1;
      if (tiles.have(number + step)) tile.fetch(p, tiles.range(number + step), which, p.dy);
      run_tile(thread, tile, count, s, sum);
    }
    const int64_t row = (at.batch * p.chain + at.block) * 2 + at.route;
    Thread<N>::store(p.carries + at.template states_at<N>(p, row), s);
    p.sums[row * p.padded + at.channel] = sum;
  }

  static __device__ __forceinline__ void run_tile(const Thread<N>& thread, const Tile<T, N>& tile, int count,
                                                  float (&s)[N], float& sum) {
    constexpr int states = Split<N>::kStates;
    for (int first = (count - 1) / kSteps * kSteps; first >= 0; first -= kSteps) {
#pragma unroll
      for (int t = first + kSteps - 1; t >= first; --t) {
        Floats<2> steps[Split<N>::kChannels];  // with dy
        thread.read(tile.steps(t), steps);
        const auto C = thread.C(tile, t);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const auto& own = steps[n / states];
          s[n] = exp2_fast(thread.A[n] * own.v[0]) * fmaf(C.v[n % states], own.v[1], s[n]);
        }
        sum += steps[0].v[0];
      }
    }
    __syncwarp();
  }
};

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

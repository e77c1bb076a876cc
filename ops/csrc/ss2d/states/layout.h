// Sizes of the fused SS2D kernels for several states a channel, N = 2 to 16: of what they leave in memory, which Python
// must know, and of the shared memory of their blocks. Neither torch nor CUDA in here.
#pragma once

namespace mmvmamba {
namespace ss2d {
namespace states {

constexpr int kStates[] = {2, 4, 8, 16};  // N with kernels of their own; others are padded to the next one
constexpr int kMostStates = 16;
constexpr int kTile = 12;                    // pixels that a warp has in shared memory at a time, an even number
constexpr int kSegment = 2 * kTile;          // pixels between two saved states
constexpr int kDtStep = 8, kColumnStep = 8;  // dt columns, and columns of a route, are multiples
constexpr int kFusedRank = 12;               // dt ranks up to which dt is projected in the kernels
constexpr int kMaxGroups = 6;                // of 32 channels, of a block in backward: 12 warps of 168 registers

constexpr int round_up(int n, int step) { return (n + step - 1) / step * step; }
constexpr int padded_states(int states) { return states <= 2 ? 2 : states <= 4 ? 4 : states <= 8 ? 8 : 16; }

// Columns of the projections of one route: dt and zeros, B and C of all states, zeros.
constexpr int dt_columns(int dt_rank) { return round_up(dt_rank, kDtStep); }
constexpr int columns(int dt_rank, int states) {
  return round_up(dt_columns(dt_rank) + 2 * padded_states(states), kColumnStep);
}

// Floats of a warp in shared memory: x, step sizes, outputs or dy, each [kTile][32]; B and C [kTile][2N]; the pixels
// of the tile in memory. Then, forward, dt [rank][kTile]; backward the states before every second step, where dt was
// before.
constexpr int kPixelFloats = 16;
constexpr int tile_floats(int states) { return 3 * kTile * 32 + kTile * 2 * states + kPixelFloats; }
constexpr int dt_floats(int fused_rank) { return fused_rank * kTile; }
constexpr int checkpoint_floats(int states) { return kTile / 2 * states * 32; }
constexpr int forward_bytes(int states, int fused_rank) {
  return 2 * 4 * (tile_floats(states) + dt_floats(fused_rank));
}
constexpr int backward_bytes(int states, int fused_rank, int groups) {
  const int checkpoints = checkpoint_floats(states), dt = dt_floats(fused_rank);
  return 2 * groups * 4 * (tile_floats(states) + (dt > checkpoints ? dt : checkpoints));
}
// Groups of 32 channels that a backward block takes, of `groups` in all, where blocks have so many bytes: evenly over
// the blocks; 0 if not one fits.
constexpr int backward_groups(int states, int fused_rank, int groups, int bytes) {
  int most = groups < kMaxGroups ? groups : kMaxGroups;
  while (most > 0 && backward_bytes(states, fused_rank, most) > bytes) --most;
  if (most == 0) return 0;
  const int blocks = (groups + most - 1) / most;
  return (groups + blocks - 1) / blocks;
}

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

// Sizes of the fused SS2D kernels for several states a channel, N = 2 to 16: of what they leave in memory, which Python
// must know, and of the shared memory of their blocks. Neither torch nor CUDA in here.
#pragma once

namespace mmvmamba {
namespace ss2d {
namespace states {

constexpr int kStates[] = {2, 4, 8, 16};  // N with kernels of their own; others are padded to the next one
constexpr int kMostStates = 16;
constexpr int kTile = 12;                    // pixels that a warp has in shared memory at a time, an even number
constexpr int kSteps = 4;                    // of a tile that are one piece of code, inert beyond the image
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

// Of the rows of a tile in shared memory: all columns if the kernels project dt, of rank fused_rank; else, 0, those of
// B, C and the zeros.
constexpr int row_width(int states, int fused_rank) {
  return fused_rank > 0 ? columns(fused_rank, states) : round_up(2 * padded_states(states), kColumnStep);
}

// Floats of a warp in shared memory. A tile: x, step sizes, outputs or dy, each [kTile][32]; the pixels of the tile in
// memory; the rows of projections. In backward besides the states before every second step.
constexpr int kTileX = 0, kTileStepSizes = kTile * 32, kTileOut = 2 * kTile * 32, kTilePixels = 3 * kTile * 32;
constexpr int kTileRows = kTilePixels + 16;
constexpr int tile_floats(int states, int fused_rank) { return kTileRows + kTile * row_width(states, fused_rank); }
constexpr int checkpoint_floats(int states) { return kTile / 2 * states * 32; }
constexpr int forward_bytes(int states, int fused_rank) { return 2 * 4 * tile_floats(states, fused_rank); }
constexpr int backward_bytes(int states, int fused_rank, int groups) {
  return 2 * groups * 4 * (tile_floats(states, fused_rank) + checkpoint_floats(states));
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

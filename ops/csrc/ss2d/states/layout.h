// Sizes of the fused SS2D kernels for several states a channel, N = 2 to 16: of what they leave in memory, which Python
// must know, and of the shared memory of their blocks. Neither torch nor CUDA in here.
#pragma once

namespace mmvmamba {
namespace ss2d {
namespace states {

constexpr int kStates[] = {2, 4, 8, 16};  // N with kernels of their own; others are padded to the next one
constexpr int kMostStates = 16;
constexpr int kTile = 12;         // pixels that a warp has in shared memory at a time, an even number
constexpr int kSteps = 4;         // of a tile that are one piece of code, inert beyond the image
constexpr int kSegmentTiles = 2;  // between two saved states
constexpr int kSegment = kSegmentTiles * kTile;
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

// Of the rows of a tile in shared memory: B, C and the zeros.
constexpr int row_width(int states) { return round_up(2 * padded_states(states), kColumnStep); }

// Floats of a warp in shared memory. A tile: step sizes and drives, [kTile][32][2]; outputs or dy, [kTile][32]; the
// pixels in memory of this tile and the next; where the warp's values are in memory; the rows of projections.
constexpr int kTileOut = 2 * kTile * 32, kTilePixels = 3 * kTile * 32, kTileSources = kTilePixels + 2 * kTile;
constexpr int kTileRows = kTileSources + 16;
constexpr int tile_floats(int states) { return kTileRows + kTile * row_width(states); }
// In forward then what the next tile is made of, as it is in memory, in pieces for kTile values of each channel: x, the
// rows of half a tile, those of the other half; and what the outputs are added to. `bytes` is the size of an element.
constexpr int kRowPieces = 1, kBeforePiece = 3;
constexpr int piece_bytes(int bytes) { return kTile * 32 * bytes; }
constexpr int forward_warp_bytes(int states, int bytes, int output_bytes) {
  return 4 * tile_floats(states) + kBeforePiece * piece_bytes(bytes) +
         piece_bytes(bytes > output_bytes ? bytes : output_bytes);
}
constexpr int forward_bytes(int states, int bytes, int output_bytes) {
  return 2 * forward_warp_bytes(states, bytes, output_bytes);
}
// In backward x, then the checkpoints, of kCheckpoint floats: a slot for each lane, and in the end kSumFloats of sums.
// The pieces, of which dy is one more, are in what the sums leave of the last checkpoints.
constexpr int kCheckpoint = 512, kCheckpoints = kTile / 2, kSumFloats = 128, kGradientPiece = 3, kBeforeGradient = 4;
static_assert(4 * (kCheckpoint - kSumFloats) >= piece_bytes(4) && kCheckpoints > kBeforeGradient, "room for pieces");
constexpr int backward_warp_bytes(int states, int bytes) {
  return 4 * (tile_floats(states) + kCheckpoints * kCheckpoint) + piece_bytes(bytes);
}
constexpr int backward_bytes(int states, int bytes, int groups) {
  return 2 * groups * backward_warp_bytes(states, bytes);
}
// Groups of 32 channels that a backward block takes, of `groups` in all, where blocks have so many bytes and elements
// `element`: evenly over the blocks; 0 if not one fits.
constexpr int backward_groups(int states, int element, int groups, int bytes) {
  int most = groups < kMaxGroups ? groups : kMaxGroups;
  while (most > 0 && backward_bytes(states, element, most) > bytes) --most;
  if (most == 0) return 0;
  const int blocks = (groups + most - 1) / most;
  return (groups + blocks - 1) / blocks;
}

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba

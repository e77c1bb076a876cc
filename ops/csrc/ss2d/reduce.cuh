// Sums over channels and over pixels inside the backward kernel, from a warp's tile of 32 channels x 16 pixels.
//
// A warp leaves three tiles in its shared memory, [32 channels][kSegment pixels]: du2, g d2 x (for dB) and h dy
// (for dC). For 16-bit types the tensor cores reduce them:
//   dprojections[pixel][column]   += sum over channels of du2 * Wdt, with dB and dC in the last two columns (fragments
//   of
//                             ones there), accumulated over the channel groups in registers;
//   weights[channel][dt]    = sum over pixels of du2 * dt, with the sum of du2 (the bias) in column Rank.
// Float inputs do the same with scalar arithmetic.
#pragma once

#include <algorithm>

#include "ss2d/projections.cuh"

namespace mmvmamba {
namespace ss2d {

// Row stride of a tile in elements: 48 bytes keeps ldmatrix free of bank conflicts; 17 floats likewise.
template <typename T> constexpr int kTileStride = sizeof(T) == 2 ? 24 : 17;
// Bytes of a warp's tiles, which hold u2 before.
template <typename T, int Rank>
constexpr int kTilesBytes = std::max<int>(3 * 32 * kTileStride<T> * sizeof(T), Projected<T, Rank>::kTileBytes);

// Per-thread part of dprojections for one route: mma accumulators, or [columns / 2] columns of a pixel for float.
template <typename T, int Rank> struct ProjectionSums {
  static constexpr int kColumns = Rank == 0 || Rank == 6 ? 8 : 16;
  static constexpr int kTiles = kColumns / 8;
  float sum[kTiles][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.f;
  }

  // Add the sums over the tile's channels. `fragment` is (columns, padded) of the route, at this group's channels.
  __device__ __forceinline__ void add(const T* tile, const T* fragment, int padded, int lane) {
    if constexpr (sizeof(T) == 2) {
      constexpr int last = kTiles - 1;
      const uint32_t ones = pack<T>(1.f, 1.f);
      const int column = lane / 4;
      const T* at = tile + ((lane >> 4) * 8 + lane % 8) * kTileStride<T> + (lane / 8 % 2) * 8;
#pragma unroll
      for (int k = 0; k < 32; k += 16) {
        uint32_t a[4];
        if constexpr (Rank > 0) {
          load_matrix<true>(a, at + k * kTileStride<T>);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const T* b = fragment + (i * 8 + column) * padded + k + lane % 4 * 2;
            mma<T>(sum[i], a, *reinterpret_cast<const uint32_t*>(b), *reinterpret_cast<const uint32_t*>(b + 8));
          }
        }
        load_matrix<true>(a, at + (32 + k) * kTileStride<T>);
        mma<T>(sum[last], a, column == 6 ? ones : 0u, column == 6 ? ones : 0u);
        load_matrix<true>(a, at + (64 + k) * kTileStride<T>);
        mma<T>(sum[last], a, column == 7 ? ones : 0u, column == 7 ? ones : 0u);
      }
    } else {
      constexpr int half_columns = kColumns / 2;
      const int pixel = lane % 16, offset = lane / 16 * half_columns;
      for (int c = 0; c < 32; ++c) {
        const float* row = tile + c * kTileStride<T> + pixel;
        if constexpr (Rank > 0) {
#pragma unroll
          for (int i = 0; i < half_columns; ++i) {
            sum[i / 4][i % 4] = fmaf(row[0], fragment[(offset + i) * padded + c], sum[i / 4][i % 4]);
          }
        }
        if (offset) {
          constexpr int b = half_columns - 2;
          sum[b / 4][b % 4] += row[32 * kTileStride<T>];
          sum[b / 4][b % 4 + 1] += row[64 * kTileStride<T>];
        }
      }
    }
  }

  // Call store(pixel, column, value, next value) for the pairs of columns this thread holds.
  template <typename Store> __device__ __forceinline__ void write(int lane, Store store) const {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        store(lane / 4, i * 8 + lane % 4 * 2, sum[i][0], sum[i][1]);
        store(lane / 4 + 8, i * 8 + lane % 4 * 2, sum[i][2], sum[i][3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 2) {
        store(lane % 16, lane / 16 * (kColumns / 2) + i, sum[i / 4][i % 4], sum[i / 4][i % 4 + 1]);
      }
    }
  }
};

// weights[channel][column] of one segment and route to `to` (32, partial_columns). Without sums of the weights in the
// kernel only the bias is left, `dbias`.
template <typename T, int Rank>
__device__ __forceinline__ void weight_sums(const T* tile, const Projections<T, Rank>& projections, int route,
                                            float dbias, float* to, int lane) {
  constexpr int columns = kPartialColumns<Rank>;
  if constexpr (Rank == 0) {
    to[lane] = dbias;
  } else if constexpr (sizeof(T) == 2) {
    uint32_t dt[4];  // pixels 0 to 7 and 8 to 15, by columns 0 to 7 and 8 to 15
    load_matrix<true>(dt, projections.matrix(route, lane));
#pragma unroll
    for (int i = 0; i < columns / 8; ++i) {
      const int column = i * 8 + lane / 4;
      if (column >= Rank) dt[2 * i] = dt[2 * i + 1] = column == Rank ? pack<T>(1.f, 1.f) : 0u;
    }
#pragma unroll
    for (int m = 0; m < 32; m += 16) {
      uint32_t a[4];
      load_matrix<false>(a, tile + (m + lane / 8 % 2 * 8 + lane % 8) * kTileStride<T> + (lane >> 4) * 8);
#pragma unroll
      for (int i = 0; i < columns / 8; ++i) {
        float d[4] = {0.f, 0.f, 0.f, 0.f};
        mma<T>(d, a, dt[2 * i], dt[2 * i + 1]);
        float* at = to + (m + lane / 4) * columns + i * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(at) = make_float2(d[0], d[1]);
        *reinterpret_cast<float2*>(at + 8 * columns) = make_float2(d[2], d[3]);
      }
    }
  } else {
    const float* rows = projections.floats + route * kSegment * columns;
    float sum[Rank + 1];
#pragma unroll
    for (int i = 0; i <= Rank; ++i) sum[i] = 0.f;
#pragma unroll
    for (int t = 0; t < kSegment; ++t) {
      const float du = tile[lane * kTileStride<T> + t];
#pragma unroll
      for (int i = 0; i < Rank; ++i) sum[i] = fmaf(du, rows[t * columns + i], sum[i]);
      sum[Rank] += du;
    }
#pragma unroll
    for (int i = 0; i < columns; ++i) to[lane * columns + i] = i <= Rank ? sum[i <= Rank ? i : 0] : 0.f;
  }
}

}  // namespace ss2d
}  // namespace mmvmamba

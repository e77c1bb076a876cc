// Sums over channels and over pixels inside the backward kernel, from a warp's tile of 32 channels x 16 pixels.
//
// A warp leaves three tiles in its shared memory, [32 channels][kSegment pixels]: du2, g d2 x (for dB) and h dy
// (for dC). For 16-bit types the tensor cores reduce them:
//   dmaps[pixel][column]   += sum over channels of du2 * Wdt, with dB and dC in the last two columns (fragments of
//                             ones there), accumulated over the channel groups in registers;
//   weights[channel][dt]    = sum over pixels of du2 * dt, with the sum of du2 (the bias) in column Rank.
// Float inputs do the same with scalar arithmetic.
#pragma once

#include "ss2d_common.cuh"

namespace mmvmamba {
namespace ss2d {

// Row stride of a tile in elements: 48 bytes keeps ldmatrix free of bank conflicts; 17 floats likewise.
template <typename T> constexpr int kTileStride = sizeof(T) == 2 ? 24 : 17;
template <typename T> constexpr int kTileSize = 3 * 32 * kTileStride<T>;

template <typename T> __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                          uint32_t b1);
template <> __device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                        uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <bool Transposed> __device__ __forceinline__ void load_matrix(uint32_t (&a)[4], const void* at) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(at));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address));
  }
}

// Per-thread part of dmaps for one route: mma accumulators, or [columns / 2] columns of a pixel for float.
template <typename T, int Rank> struct MapSums {
  static constexpr int kColumns = Rank == 0 ? 8 : Maps<Rank>::kColumns;
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
      const uint32_t ones = pack2<T>(1.f, 1.f);
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

// weights[channel][column] of one segment and route to `to` (32, partial_columns); `rows` are the staged maps. Without
// a dt projection in the kernel only the bias is left, `dbias`.
template <typename T, int Rank>
__device__ __forceinline__ void weight_sums(const T* tile, const float* rows, float dbias, float* to, int lane) {
  constexpr int columns = kPartialColumns<Rank>;
  if constexpr (Rank == 0) {
    to[lane] = dbias;
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int m = 0; m < 32; m += 16) {
      uint32_t a[4];
      load_matrix<false>(a, tile + (m + lane / 8 % 2 * 8 + lane % 8) * kTileStride<T> + (lane >> 4) * 8);
#pragma unroll
      for (int i = 0; i < columns / 8; ++i) {
        const int column = i * 8 + lane / 4;
        const float* b = rows + lane % 4 * 2 * columns + column;
        uint32_t b0 = pack2<T>(b[0], b[columns]), b1 = pack2<T>(b[8 * columns], b[9 * columns]);
        if (column >= Rank) b0 = b1 = column == Rank ? pack2<T>(1.f, 1.f) : 0u;
        float d[4] = {0.f, 0.f, 0.f, 0.f};
        mma<T>(d, a, b0, b1);
        float* at = to + (m + lane / 4) * columns + i * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(at) = make_float2(d[0], d[1]);
        *reinterpret_cast<float2*>(at + 8 * columns) = make_float2(d[2], d[3]);
      }
    }
  } else {
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

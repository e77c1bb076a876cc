// The hidden layer of an MLP, hidden = a b^T + bias and GELU(hidden), with GELU applied before the product leaves the
// registers. For 16-bit types and few channels, where a product moves more than it computes: a pass over the widest map
// of a block is what this saves.
//
// A block keeps the rows of b for its 128 columns of the result in shared memory and walks over tiles of 64 rows, whose
// part of a is copied while the tile before is computed. A warp owns 32 x 32 of a tile, on the tensor cores. The rows
// of b are permuted in shared memory so that the columns of a thread are 8 neighbours: 16 bytes to load and store.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/ceil_div.h"
#include "common/launch.cuh"
#include "common/tensor_core.cuh"
#include "common/vector.cuh"
#include "fused/common/gelu.cuh"

namespace mmvmamba {
namespace product {

constexpr int kRows = 64, kColumns = 128;  // of a tile
constexpr int kWarpRows = 32, kWarpColumns = 32;
constexpr int kWarpsDown = kRows / kWarpRows, kWarpsAcross = kColumns / kWarpColumns;
constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;

struct Args {
  const void *a, *b;  // (rows, Depth), (columns, Depth)
  const void* bias;   // (columns)
  void* hidden;       // (rows, columns), or null
  void* activated;    // (rows, columns)
  int64_t rows;
  int columns;
};

// A row in shared memory: 16 bytes more than a multiple of 64 keep load_matrix free of bank conflicts.
template <int Depth> constexpr int kStride = Depth + 8;
template <int Depth> constexpr int kSharedBytes = (kColumns + 2 * kRows) * kStride<Depth> * 2;

// Where in shared memory the row of b for a column lies: columns 8 q + 2 j + e of 32 come to 8 j + 2 q + e, where lane
// q of four finds 2 of each product of 8 columns.
__device__ __forceinline__ int permuted_row(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

// Begin to copy rows `first` and on of `from` (end, Depth); rows beyond the last become zeros.
template <int Depth, int Count, bool Permuted, typename T>
__device__ __forceinline__ void copy_rows(const T* from, int64_t first, int64_t end, T* to) {
  constexpr int parts = Depth / 8;
  static_assert(Count * parts % kThreads == 0, "every thread copies as many parts");
#pragma unroll
  for (int i = 0; i < Count * parts / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x, row = at / parts, part = at % parts;
    const bool valid = first + row < end;
    const int place = Permuted ? permuted_row(row) : row;
    copy_async<16>(to + place * kStride<Depth> + part * 8, from + (valid ? first + row : 0) * Depth + part * 8, valid);
  }
}

template <typename T, int Depth>
struct HiddenKernel {
  static constexpr int kThreads = product::kThreads, kBlocks = 2;

  static __device__ __forceinline__ void run(const Args& p) {
    constexpr int stride = kStride<Depth>;
    T* b = shared_memory<T>();
    T* tiles_of_a = b + kColumns * stride;
    const int lane = threadIdx.x % 32, down = threadIdx.x / 32 / kWarpsAcross, across = threadIdx.x / 32 % kWarpsAcross;
    const int column = blockIdx.x * kColumns + across * kWarpColumns + lane % 4 * 8;  // the first of the thread's eight
    const T* a_from = static_cast<const T*>(p.a);
    const int64_t tiles = ceil_div(p.rows, kRows);

    copy_rows<Depth, kColumns, true>(static_cast<const T*>(p.b), blockIdx.x * kColumns, p.columns, b);
    copy_rows<Depth, kRows, false>(a_from, blockIdx.y * kRows, p.rows, tiles_of_a);
    float bias[8];
    load(static_cast<const T*>(p.bias) + column, bias);
    // where load_matrix begins for this lane: of a 16 x 16 of a, and 16 rows of b
    const int a_at = (down * kWarpRows + lane % 16) * stride + lane / 16 * 8;
    const T* b_at = b + (across * kWarpColumns + lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;

    int which = 0;
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y, which ^= 1) {
      wait_for_copies();
      __syncthreads();  // the copies of all are there, and the other half has been read
      if (tile + gridDim.y < tiles) {
        copy_rows<Depth, kRows, false>(a_from, (tile + gridDim.y) * kRows, p.rows,
                                       tiles_of_a + (1 - which) * kRows * stride);
      }
      const int64_t first_row = tile * kRows + down * kWarpRows + lane / 4;
      float sum[2][4][4] = {};  // [16 rows][8 columns]
      const T* a = tiles_of_a + which * kRows * stride + a_at;
#pragma unroll
      for (int k = 0; k < Depth; k += 16) {
        uint32_t a_part[2][4], b_part[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          load_matrix<false>(a_part[i], a + i * 16 * stride + k);
          load_matrix<false>(b_part[i], b_at + i * 16 * stride + k);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            mma<T>(sum[i][j], a_part[i], b_part[j / 2][j % 2 * 2], b_part[j / 2][j % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + i * 8, at = row * p.columns + column;
        if (row >= p.rows) continue;
        float v[8], activated[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          v[j] = widen(narrow<T>(sum[i / 2][j / 2][i % 2 * 2 + j % 2] + bias[j]));  // what backward will read
          activated[j] = gelu<false>(v[j]);
        }
        if (p.hidden != nullptr) store(static_cast<T*>(p.hidden) + at, v);
        store(static_cast<T*>(p.activated) + at, activated);
      }
    }
  }
};

}  // namespace product
}  // namespace mmvmamba

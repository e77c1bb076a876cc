// The backward of an MLP's hidden layer as one pass over its widest map, for 16-bit types and few channels:
//
//   grad = GELU'(hidden) * (dy W2), written, since the gradient of x needs it whole, and its sums over rows
//   dW2  = dy^T GELU(hidden) and dW1 = grad^T x, from tiles that are in shared memory anyway
//
// A block keeps `Columns` columns of the hidden layer and walks over tiles of 64 rows. Its 8 warps share a tile's
// products on the tensor cores; the sums for the weights stay in registers over all tiles and leave as one partial sum
// a block. dy and x of the next tile are copied, and its hidden values loaded, while this one is computed.
#pragma once

#include "fused/mlp/product.cuh"

namespace mmvmamba {
namespace product {

struct BackwardArgs {
  const void *dy, *x;       // (rows, Depth)
  const void* weight2;      // (columns, Depth), transposed
  const void* hidden;       // (rows, columns)
  void* grad;               // (rows, columns)
  float *bias, *dw1, *dw2;  // partial sums, (gridDim.y, columns), (.., columns, Depth) and (.., Depth, columns)
  int64_t rows;
  int columns;
};

template <int Depth, int Columns> struct BackwardMemory {
  static constexpr int kMap = Depth + 8, kTile = Columns + 8;  // elements of a row
  static constexpr int kBytes = 2 * (Columns * kMap + 4 * kRows * kMap + 2 * kRows * kTile);
};

// Where load_matrix<true> begins for a lane, of a matrix that lies with its 16 summed rows below one another: for
// an operand a, 16 of its rows side by side; for an operand b, two times 8 of its columns.
__device__ __forceinline__ int transposed_a(int lane, int stride) {
  return (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
}
__device__ __forceinline__ int transposed_b(int lane, int stride) {
  return (lane / 8 % 2 * 8 + lane % 8) * stride + lane / 16 * 8;
}

// sum += a^T b over the kRows rows of both tiles, `a` and `b` at the warp's columns.
template <typename T, int Down, int Across>
__device__ __forceinline__ void add_product(float (&sum)[Down][Across][4], const T* a, int a_stride, const T* b,
                                            int b_stride, int lane) {
  a += transposed_a(lane, a_stride), b += transposed_b(lane, b_stride);
#pragma unroll
  for (int k = 0; k < kRows; k += 16) {
    uint32_t a_part[Down][4], b_part[4];
#pragma unroll
    for (int i = 0; i < Down; ++i) load_matrix<true>(a_part[i], a + k * a_stride + i * 16);
#pragma unroll
    for (int j = 0; j < Across; j += 2) {
      load_matrix<true>(b_part, b + k * b_stride + j * 8);
#pragma unroll
      for (int i = 0; i < Down; ++i) {
        mma<T>(sum[i][j], a_part[i], b_part[0], b_part[1]);
        mma<T>(sum[i][j + 1], a_part[i], b_part[2], b_part[3]);
      }
    }
  }
}

// The warp's part of a sum to its place in a matrix of `stride` columns.
template <int Down, int Across>
__device__ __forceinline__ void store_partial(const float (&sum)[Down][Across][4], float* to, int stride, int lane) {
  to += lane / 4 * stride + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Down; ++i) {
#pragma unroll
    for (int j = 0; j < Across; ++j) {
      float* at = to + i * 16 * stride + j * 8;
      *reinterpret_cast<float2*>(at) = make_float2(sum[i][j][0], sum[i][j][1]);
      *reinterpret_cast<float2*>(at + 8 * stride) = make_float2(sum[i][j][2], sum[i][j][3]);
    }
  }
}

template <typename T, int Depth, int Columns> struct HiddenBackwardKernel {
  static constexpr int kThreads = product::kThreads, kBlocks = 1;
  static constexpr int kMap = BackwardMemory<Depth, Columns>::kMap, kTile = BackwardMemory<Depth, Columns>::kTile;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kAcross = Columns / 32,
                       kDown = kWarps / kAcross;                    // warps of a tile of the hidden layer, and of dW2
  static constexpr int kParts = kRows / kDown / 16;                 // of 16 rows, of a warp in the hidden layer
  static constexpr int kWide = 32 / 8, kDeep = Depth / kDown / 16;  // of dW2: 8 columns, 16 rows
  static constexpr int kLongDown = Columns / 32, kLongAcross = kWarps / kLongDown;  // warps of dW1
  static constexpr int kLongWide = Depth / kLongAcross / 8;

  // A block: its memory, and where a thread works.
  struct Block {
    const BackwardArgs& p;
    T *weight, *dy_tiles, *x_tiles, *activated, *grads;
    const int lane, warp, warp_row, local, column;  // local, column: the first of the thread's eight

    __device__ __forceinline__ explicit Block(const BackwardArgs& args)
        : p(args),
          weight(shared_memory<T>()),
          dy_tiles(weight + Columns * kMap),
          x_tiles(dy_tiles + 2 * kRows * kMap),
          activated(x_tiles + 2 * kRows * kMap),
          grads(activated + kRows * kTile),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          warp_row(warp / kAcross * (kRows / kDown)),
          local(warp % kAcross * 32 + lane % 4 * 8),
          column(blockIdx.x * Columns + local) {}

    __device__ __forceinline__ void copy_weight() const {
      copy_rows<Depth, Columns, true>(static_cast<const T*>(p.weight2), blockIdx.x * Columns, p.columns, weight);
    }
    __device__ __forceinline__ void copy_tiles(int64_t tile, int which) const {
      const T *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x);
      copy_rows<Depth, kRows, false>(dy, tile * kRows, p.rows, dy_tiles + which * kRows * kMap);
      copy_rows<Depth, kRows, false>(x, tile * kRows, p.rows, x_tiles + which * kRows * kMap);
    }
    __device__ __forceinline__ void load_hidden(int64_t tile, uint4 (&hidden)[2 * kParts]) const {
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {
        const int64_t row = tile * kRows + warp_row + lane / 4 + i * 8;
        hidden[i] = make_uint4(0, 0, 0, 0);
        if (row < p.rows) {
          hidden[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.hidden) + row * p.columns + column);
        }
      }
    }

    // dy W2 of the warp's part of a tile.
    __device__ __forceinline__ void multiply(const T* dy_tile, float (&sum)[kParts][4][4]) const {
      const int a_at = (warp_row + lane % 16) * kMap + lane / 16 * 8;
      const T* b_at = weight + (warp % kAcross * 32 + lane / 16 * 8 + lane % 8) * kMap + lane / 8 % 2 * 8;
#pragma unroll
      for (int k = 0; k < Depth; k += 16) {
        uint32_t a_part[kParts][4], b_part[2][4];
#pragma unroll
        for (int i = 0; i < kParts; ++i) load_matrix<false>(a_part[i], dy_tile + a_at + i * 16 * kMap + k);
#pragma unroll
        for (int i = 0; i < 2; ++i) load_matrix<false>(b_part[i], b_at + i * 16 * kMap + k);
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            mma<T>(sum[i][j], a_part[i], b_part[j / 2][j % 2 * 2], b_part[j / 2][j % 2 * 2 + 1]);
          }
        }
      }
    }

    // GELU and the gradient before it, to the tiles in shared memory, the latter to memory as well.
    __device__ __forceinline__ void activate(int64_t tile, const uint4 (&hidden)[2 * kParts],
                                             const float (&sum)[kParts][4][4], float (&bias)[8]) const {
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {  // rows beyond the last are zeros and add nothing
        const int row = warp_row + lane / 4 + i * 8;
        float v[8], y[8];
        load(reinterpret_cast<const T*>(&hidden[i]), v);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 value = gelu_and_slope<false>(v[j]);
          y[j] = value.x;
          v[j] = value.y * sum[i / 2][j / 2][i % 2 * 2 + j % 2];
          bias[j] += v[j];
        }
        store(activated + row * kTile + local, y);
        store(grads + row * kTile + local, v);
        if (tile * kRows + row < p.rows) {
          store(static_cast<T*>(p.grad) + (tile * kRows + row) * p.columns + column, v);
        }
      }
    }

    // The sums over rows for the bias: of a warp, then over the warps below one another, in a fixed order.
    __device__ __forceinline__ void reduce_bias(float (&bias)[8]) const {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) bias[j] += __shfl_xor_sync(0xffffffffu, bias[j], offset);
      }
      wait_for_copies();                      // without rows nobody has waited
      __syncthreads();                        // the tiles have been read
      float* below = shared_memory<float>();  // [down][Columns]
      if (lane < 4) store(below + warp / kAcross * Columns + local, bias);
      __syncthreads();
      for (int i = threadIdx.x; i < Columns; i += kThreads) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kDown; ++j) sum += below[j * Columns + i];
        p.bias[static_cast<int64_t>(blockIdx.y) * p.columns + static_cast<int64_t>(blockIdx.x) * Columns + i] = sum;
      }
    }
  };

  static __device__ __forceinline__ void run(const BackwardArgs& p) {
    const Block block(p);
    const int lane = block.lane, warp = block.warp;
    const int64_t tiles = ceil_div(p.rows, kRows);
    uint4 hidden[2 * kParts];
    block.copy_weight();
    block.copy_tiles(blockIdx.y, 0);
    block.load_hidden(blockIdx.y, hidden);
    float bias[8] = {}, dw2[kDeep][kWide][4] = {}, dw1[2][kLongWide][4] = {};
    int which = 0;
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y, which ^= 1) {
      wait_for_copies();
      __syncthreads();  // the copies of all are there, and the tiles before have been read
      if (tile + gridDim.y < tiles) block.copy_tiles(tile + gridDim.y, 1 - which);
      const T *dy_tile = block.dy_tiles + which * kRows * kMap, *x_tile = block.x_tiles + which * kRows * kMap;
      {
        float sum[kParts][4][4] = {};
        block.multiply(dy_tile, sum);
        block.activate(tile, hidden, sum, bias);
      }
      if (tile + gridDim.y < tiles) block.load_hidden(tile + gridDim.y, hidden);
      __syncthreads();
      add_product(dw2, dy_tile + warp / kAcross * (16 * kDeep), kMap, block.activated + warp % kAcross * 32, kTile,
                  lane);
      add_product(dw1, block.grads + warp / kLongAcross * 32, kTile, x_tile + warp % kLongAcross * (8 * kLongWide),
                  kMap, lane);
    }
    const int64_t part = blockIdx.y, first = blockIdx.x * Columns;
    const int64_t dw2_row = part * Depth + warp / kAcross * (16 * kDeep);
    const int64_t dw1_row = part * p.columns + first + warp / kLongAcross * 32;
    store_partial(dw2, p.dw2 + dw2_row * p.columns + first + warp % kAcross * 32, p.columns, lane);
    store_partial(dw1, p.dw1 + dw1_row * Depth + warp % kLongAcross * (8 * kLongWide), Depth, lane);
    block.reduce_bias(bias);
  }
};

}  // namespace product
}  // namespace mmvmamba

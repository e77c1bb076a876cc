// The projections of a warp's segment in shared memory (dt, B and C of both routes of the pair), and u2 of its steps
// from them.
//
// 16-bit types: u2 of a segment and route is a product on the tensor cores, [16 pixels][columns] x [columns][32
//   channels] for any dt rank, left in shared memory as float [pixel][channel]: a lane then reads its channel.
// float: multiply-adds in every step for dt ranks up to 12; for greater ones a GEMM has left u in memory.
#pragma once

#include "ss2d/segment.cuh"

namespace mmvmamba {
namespace ss2d {

static_assert(2 * kSegment == 32, "a lane has a row of projections: a pixel of the segment and a route of the pair");

// ---- projections
// ----------------------------------------------------------------------------------------------------------- Rows
// beyond the image repeat its last one: x and dy are zero there, which makes the steps inert (no drive, no output, no
// gradient), and zeros in the projections as well would meet an infinite weight as NaN.
template <typename T, int Rank> struct Projections {
  static constexpr bool kHalf = sizeof(T) == 2;
  // a row in float: dt zero padded, B, C; only B and C if dt is projected elsewhere
  static constexpr int kColumns = kHalf || Rank == 0 ? 2 : Rank <= 6 ? 8 : 16;
  float* floats;  // [2][kSegment][kColumns]
  T* rows;        // 16-bit types: [2][kSegment][stride], whole rows as they are in memory
  int stride;

  // Columns of a row in memory.
  __host__ __device__ static constexpr int columns(int projection_columns) {
    return Rank == 0 ? projection_columns : Rank <= 6 ? 8 : 16;
  }
  // 16 bytes more than a power of two keep load_matrix free of bank conflicts.
  __host__ __device__ static constexpr int row_stride(int projection_columns) {
    return Rank == 6 ? 8 : columns(projection_columns) + 8;
  }
  // Bytes of a warp.
  __host__ __device__ static constexpr int bytes(int projection_columns) {
    return 32 * (kColumns * sizeof(float) + (kHalf ? row_stride(projection_columns) * sizeof(T) : 0));
  }

  __device__ __forceinline__ Projections(const Args& p, char* shared)
      : floats(reinterpret_cast<float*>(shared)),
        rows(reinterpret_cast<T*>(floats + 32 * kColumns)),
        stride(row_stride(p.projection_columns)) {}

  // Begin to load. In memory the two rows of a pixel are neighbours: of 16-bit types, neighbouring lanes copy
  // neighbouring parts of them, in as few requests as there are lines.
  __device__ __forceinline__ void load(const Args& p, const Place& at) const {
    const T* image =
        static_cast<const T*>(p.projections) + (at.batch * p.length * 4 + 2 * at.pair) * p.projection_columns;
    if constexpr (kHalf) {
      const int per_row = columns(p.projection_columns) / 8, per_pixel = 2 * per_row;
      for (int i = at.lane; i < kSegment * per_pixel; i += 32) {
        const int t = Rank == 0 ? p.by_parts.div(i) : i / per_pixel, part = i - t * per_pixel;
        const int route = part >= per_row;
        const uint32_t pixel = at.pixel(p, t);
        copy_async<16>(rows + (route * kSegment + t) * stride + (part - route * per_row) * 8,
                       image + pixel * 4 * p.projection_columns + part * 8, true);
      }
    } else {
      const int route = at.lane / kSegment, t = at.lane % kSegment;
      const uint32_t pixel = at.pixel(p, t);
      const T* from = image + (pixel * 4 + route) * p.projection_columns;
      if constexpr (Rank == 0) {
        copy_async<8>(floats + at.lane * 2, from + p.projection_columns - 2, true);
      } else {
#pragma unroll
        for (int i = 0; i < kColumns; i += 4) copy_async<16>(floats + at.lane * kColumns + i, from + i, true);
      }
    }
  }

  // After the wait for copies: B and C in float. The other lanes see them after the next barrier.
  __device__ __forceinline__ void convert(const Args& p, int lane) const {
    if constexpr (kHalf) {
      __syncwarp();  // the copies of the other lanes are there
      const T* bc = rows + lane * stride + columns(p.projection_columns) - 2;
      *reinterpret_cast<float2*>(floats + lane * 2) = make_float2(widen(bc[0]), widen(bc[1]));
    }
  }

  // B and C of a step.
  __device__ __forceinline__ float2 bc(int route, int t) const {
    return *reinterpret_cast<const float2*>(floats + (route * kSegment + t) * kColumns + kColumns - 2);
  }
  // Of two neighbours at once, t even.
  __device__ __forceinline__ float4 bc_pair(int route, int t) const {
    if constexpr (kColumns == 2) return *reinterpret_cast<const float4*>(floats + (route * kSegment + t) * 2);
    const float2 low = bc(route, t), high = bc(route, t + 1);
    return make_float4(low.x, low.y, high.x, high.y);
  }
  // The same as `bc` for the i-th step of a walk over all of them, in either direction; `two` is kept between steps.
  __device__ __forceinline__ float2 bc_of_walk(int route, int i, int t, float4& two) const {
    if (i % 2 == 0) two = bc_pair(route, t & ~1);
    return t % 2 ? make_float2(two.z, two.w) : make_float2(two.x, two.y);
  }

  // Where load_matrix of a 16 x 16 part of the route's rows starts for this lane.
  __device__ __forceinline__ const T* matrix(int route, int lane) const {
    return rows + (route * kSegment + lane % 16) * stride + (Rank == 6 ? 0 : lane / 16 * 8);
  }
};

// ---- u2 -------------------------------------------------------------------------------------------------------------
// What the tensor cores need of a route and a group of 32 channels, prepared by prepare_kernel: bias, then Wdt as
// fragments. This many bytes.
template <typename T, int Rank> __host__ __device__ constexpr int operand_bytes(int projection_columns) {
  return sizeof(T) == 2 ? 32 * sizeof(float) + Projections<T, Rank>::columns(projection_columns) * 32 * sizeof(T) : 0;
}

template <typename T, int Rank>
__device__ __forceinline__ const char* operand_of(const Args& p, const Place& at, int route) {
  const int number = (2 * at.pair + route) * p.groups + at.group;
  return static_cast<const char*>(p.dt_operand) + number * operand_bytes<T, Rank>(p.projection_columns);
}

// Bytes of the operands that a block keeps in shared memory, of both routes. Those of great ranks are read where they
// are: so much memory would cost more, in blocks that run beside, than the latency does.
template <typename T, int Rank> __host__ __device__ constexpr int kept_bytes(int projection_columns) {
  return Projections<T, Rank>::columns(projection_columns) <= 64 ? 2 * operand_bytes<T, Rank>(projection_columns) : 0;
}

// Begin to copy the operands of both routes of the pair to shared memory, by all threads of the block.
template <typename T, int Rank>
__device__ __forceinline__ void load_operands(const Args& p, const Place& at, char* shared) {
  const int kept = kept_bytes<T, Rank>(p.projection_columns), bytes = kept / 2;
  for (int i = threadIdx.x * 16; i < kept; i += blockDim.x * 16) {
    const char* from = i < bytes ? operand_of<T, Rank>(p, at, 0) + i : operand_of<T, Rank>(p, at, 1) + i - bytes;
    copy_async<16>(shared + i, from, true);
  }
}

// Those of a route, kept or not.
template <typename T, int Rank>
__device__ __forceinline__ const char* operand_at(const Args& p, const Place& at, const char* kept, int route) {
  const int bytes = kept_bytes<T, Rank>(p.projection_columns);
  return bytes > 0 ? kept + route * (bytes / 2) : operand_of<T, Rank>(p, at, route);
}

// u2 of the thread's segment on one route, by way of a tile of the warp.
template <typename T, int Rank, bool Half = sizeof(T) == 2> struct Projected {
  static constexpr int kRow = 40;  // floats from a pixel to the next: stores of fragments then meet no bank conflict
  static constexpr int kTileBytes = kSegment * kRow * sizeof(float);
  const float* tile;

  __device__ __forceinline__ Projected(const Args& p, const Place& at, const Projections<T, Rank>& projections,
                                       const Segment<T>&, const char* operand, void* scratch, int route) {
    float sum[4][4];
    const float4* bias = reinterpret_cast<const float4*>(operand) + at.lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      const float4 b = bias[n / 2];
      sum[n][0] = sum[n][2] = b.x, sum[n][1] = sum[n][3] = b.y;
      sum[n + 1][0] = sum[n + 1][2] = b.z, sum[n + 1][1] = sum[n + 1][3] = b.w;
    }
    const T* matrix = projections.matrix(route, at.lane);
    const uint4* weight = reinterpret_cast<const uint4*>(operand + 32 * sizeof(float)) + at.lane;
    if constexpr (Rank == 6) {
      const uint4 b = *weight;
      uint32_t a[4];
      load_matrix<false>(a, matrix);
      mma_short<T>(sum[0], a, b.x), mma_short<T>(sum[1], a, b.y);
      mma_short<T>(sum[2], a, b.z), mma_short<T>(sum[3], a, b.w);
    } else {
      const int columns = Projections<T, Rank>::columns(p.projection_columns);
      const auto add = [&] {
        const uint4 low = weight[0], high = weight[32];
        uint32_t a[4];
        load_matrix<false>(a, matrix);
        mma<T>(sum[0], a, low.x, low.y), mma<T>(sum[1], a, low.z, low.w);
        mma<T>(sum[2], a, high.x, high.y), mma<T>(sum[3], a, high.z, high.w);
        matrix += 16, weight += 64;
      };
      add();      // there is one at least, which the compiler doesn't know
#pragma unroll 1  // the registers are few
      for (int k = 16; k < columns; k += 16) add();
    }
    __syncwarp();  // all lanes have read what was there
    float* row = static_cast<float*>(scratch) + at.lane / 4 * kRow + at.lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      *reinterpret_cast<float2*>(row + n * 8) = make_float2(sum[n][0], sum[n][1]);
      *reinterpret_cast<float2*>(row + n * 8 + 8 * kRow) = make_float2(sum[n][2], sum[n][3]);
    }
    __syncwarp();
    tile = static_cast<const float*>(scratch) + at.lane;
  }
  __device__ __forceinline__ float operator[](int t) const { return tile[t * kRow]; }
};

template <typename T, int Rank> struct Projected<T, Rank, false> {
  static constexpr int kTileBytes = Rank == 0 ? Segment<T>::kSize * sizeof(T) : 0;
  float weight[Rank ? Rank : 1], bias;
  const float *rows, *tile;

  __device__ __forceinline__ Projected(const Args& p, const Place& at, const Projections<T, Rank>& projections,
                                       const Segment<T>& segment, const char*, void* scratch, int route)
      : rows(projections.floats + route * kSegment * Projections<T, Rank>::kColumns) {
    const int q = 2 * at.pair + route;
    bias = p.bias[q * p.padded + at.padded_channel];
    if constexpr (Rank == 0) {
      __syncwarp();
      const T* image = static_cast<const T*>(p.u) + (at.batch * p.length * 4 + q) * p.channels;
      segment.load(p, at, image, 4 * p.channels, static_cast<T*>(scratch));
      wait_for_copies();
      __syncwarp();
      tile = static_cast<const float*>(scratch) + at.lane;
    } else {
#pragma unroll
      for (int i = 0; i < Rank; ++i) weight[i] = p.dt_weight[(q * Rank + i) * p.padded + at.padded_channel];
    }
  }
  __device__ __forceinline__ float operator[](int t) const {
    if constexpr (Rank == 0) return bias + tile[t * 32];
    float u = bias;
#pragma unroll
    for (int i = 0; i < Rank; i += 2) {
      const float2 dt = *reinterpret_cast<const float2*>(rows + t * Projections<T, Rank>::kColumns + i);
      u = fmaf(weight[i], dt.x, u);
      u = fmaf(weight[i + 1], dt.y, u);
    }
    return u;
  }
};

}  // namespace ss2d
}  // namespace mmvmamba

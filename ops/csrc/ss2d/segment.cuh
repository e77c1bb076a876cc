// A warp's segment of a map, kSegment pixels by 32 channels, between memory and shared memory: 16 bytes a lane at a
// time, in the background where it is read, so that loads overlap with the work before.
#pragma once

#include "common/tensor_core.cuh"
#include "ss2d/common.cuh"

namespace mmvmamba {
namespace ss2d {

// Where a thread works.
struct Place {
  int lane, warp, warps, block, group, padded_channel, channel, first, count, pair;
  int64_t batch;
  bool active;  // whether its channel exists; else `channel` is another one
  bool column_order;
  const int* pixels;  // of the warp's steps, in shared memory

  // Blocks are numbered by image, then by `part` (channel group or split), then along the chain. The second pair takes
  // the images from the last: the L2 cache still holds what the first has left there.
  __device__ __forceinline__ Place(const Args& p, const Divisor& by_parts, int& part)
      : lane(threadIdx.x & 31),
        warp(threadIdx.x >> 5),
        warps(blockDim.x >> 5),
        pair(p.pair),
        column_order(p.column_order) {
    const auto in_chain = p.by_chain.divmod(blockIdx.x), in_image = by_parts.divmod(in_chain.div);
    block = in_chain.mod, part = in_image.mod;
    batch = pair == 1 ? p.batch - 1 - in_image.div : in_image.div;
    first = (block * warps + warp) * kSegment;
    count = max(0, min(kSegment, p.length - first));
  }
  __device__ __forceinline__ void select_group(const Args& p, int which) {
    group = which;
    padded_channel = group * 32 + lane;
    active = padded_channel < p.channels;
    channel = active ? padded_channel : p.channels - 1;
  }
  // Of a block of one channel group.
  __device__ __forceinline__ static Place of_group(const Args& p) {
    int group;
    Place at(p, p.by_groups, group);
    at.select_group(p, group);
    return at;
  }
  // For a kernel that takes both pairs, launched with the arguments of the second.
  __device__ __forceinline__ void select_pair(const Args& p, int which) {
    pair = which;
    column_order = which == 1 && p.column_order;
  }
  // Write where the pair's order has the warp's steps to `table`, [kSegment]; one beyond the image is itself.
  __device__ __forceinline__ const Place& tabulate(const Args& p, int* table) {
    if (lane < kSegment) {
      const int step = first + lane;
      const auto at = p.by_height.divmod(step);  // column and row
      table[lane] = column_order && step < p.length ? at.mod * p.width + at.div : step;
    }
    __syncwarp();
    pixels = table;
    return *this;
  }
  // Memory index of step t of the segment; of one beyond the image another's.
  __device__ __forceinline__ int pixel(const Args& p, int t) const { return min(pixels[t], p.length - 1); }
};

// The parts of a segment that a lane copies. Tiles are [kSegment][32]; images are given by their first pixel, `stride`
// elements from one pixel to the next.
template <typename E> struct Segment {
  static constexpr int kPart = 16 / sizeof(E), kParts = 32 / kPart, kRows = 32 / kParts, kTimes = kSegment / kRows;
  static constexpr int kSize = kSegment * 32;  // elements of a tile
  int row, part;
  uint32_t pixel[kTimes];

  __device__ __forceinline__ Segment(const Args& p, const Place& at)
      : row(at.lane / kParts), part(at.lane % kParts * kPart) {
#pragma unroll
    for (int i = 0; i < kTimes; ++i) pixel[i] = at.pixel(p, row + i * kRows);
  }

  // Begin to load the channels of the group; what lies beyond the image or the channels is zero.
  __device__ __forceinline__ void load(const Args& p, const Place& at, const E* image, int stride, E* tile) const {
    if (p.channels % kPart == 0) {
      const int channel = at.group * 32 + part;
#pragma unroll
      for (int i = 0; i < kTimes; ++i) {
        const bool valid = channel < p.channels && row + i * kRows < at.count;
        copy_async<16>(tile + (row + i * kRows) * 32 + part, image + pixel[i] * stride + (valid ? channel : 0), valid);
      }
    } else {
      for (int t = 0; t < kSegment; ++t) {
        const bool valid = at.active && t < at.count;
        tile[t * 32 + at.lane] =
            valid ? image[static_cast<uint32_t>(at.pixel(p, t)) * stride + at.channel] : narrow<E>(0.f);
      }
    }
  }

  // Store a tile that the warp has written.
  __device__ __forceinline__ void store(const Args& p, const Place& at, const E* tile, E* image, int stride) const {
    __syncwarp();
    if (p.channels % kPart == 0) {
      const int channel = at.group * 32 + part;
#pragma unroll
      for (int i = 0; i < kTimes; ++i) {
        if (channel < p.channels && row + i * kRows < at.count) {
          *reinterpret_cast<uint4*>(image + pixel[i] * stride + channel) =
              *reinterpret_cast<const uint4*>(tile + (row + i * kRows) * 32 + part);
        }
      }
    } else {
      for (int t = 0; t < kSegment; ++t) {
        if (at.active && t < at.count) {
          image[static_cast<uint32_t>(at.pixel(p, t)) * stride + at.channel] = tile[t * 32 + at.lane];
        }
      }
    }
  }
};

// The channel of a lane, from and to a tile.
template <typename T> __device__ __forceinline__ Values<T> read_tile(const T* tile, int lane) {
  T raw[kSegment];
#pragma unroll
  for (int t = 0; t < kSegment; ++t) raw[t] = tile[t * 32 + lane];
  Values<T> values;
  values.set_raw(raw);
  return values;
}
template <typename E>
__device__ __forceinline__ void write_tile(E* tile, int lane, const float (&values)[kSegment]) {
#pragma unroll
  for (int t = 0; t < kSegment; ++t) tile[t * 32 + lane] = narrow<E>(values[t]);
}

}  // namespace ss2d
}  // namespace mmvmamba

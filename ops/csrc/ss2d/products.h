// What the two fused SS2D cores on CUDA, for one state and for several, do with torch's own GEMMs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

#include <cstdint>

#include "common/allocate.h"

namespace mmvmamba {
namespace ss2d {

// `x` with its channels last, at a multiple of 16 bytes: itself or a copy.
inline at::Tensor channel_last(const at::Tensor& x) {
  const at::Tensor map = x.contiguous(at::MemoryFormat::ChannelsLast);
  return reinterpret_cast<std::uintptr_t>(map.data_ptr()) % 16 ? map.clone() : map;
}

// Some columns of a matrix of many rows, `stride` elements from one to the next, `offset` to the first.
struct Tall {
  const at::Tensor& tensor;
  int64_t columns, stride, offset = 0;

  at::Tensor view(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t first_row) const {
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset + first_row * stride);
  }
};

// Parts of a^T b, to be added in float: those of `chunks` chunks of rows as a batch, so that the GEMM fills the GPU,
// then that of the rows left over. No more chunks than rows.
inline int64_t tall_parts(int64_t rows, int64_t chunks) { return chunks + (rows % chunks > 0); }

// The parts to `parts`, (tall_parts, a.columns, b.columns), `offset` elements from its beginning.
inline void tall_product(const Tall& a, const Tall& b, int64_t rows, int64_t chunks, const at::Tensor& parts,
                         int64_t offset = 0) {
  const int64_t length = rows / chunks, whole = length * chunks, rest = rows - whole, size = a.columns * b.columns;
  at::Tensor first = parts.as_strided({chunks, a.columns, b.columns}, {size, b.columns, 1}, offset);
  at::bmm_out(first, a.view({chunks, a.columns, length}, {length * a.stride, 1, a.stride}, 0),
              b.view({chunks, length, b.columns}, {length * b.stride, b.stride, 1}, 0));
  if (rest > 0) {
    at::Tensor last = parts.as_strided({a.columns, b.columns}, {b.columns, 1}, offset + chunks * size);
    at::mm_out(last, a.view({a.columns, rest}, {1, a.stride}, whole), b.view({rest, b.columns}, {b.stride, 1}, whole));
  }
}

// The same in memory of its own, of dense matrices.
inline at::Tensor tall_product(const at::Tensor& a, int64_t a_columns, const at::Tensor& b, int64_t b_columns,
                               int64_t rows, int64_t chunks) {
  at::Tensor parts = allocate({tall_parts(rows, chunks), a_columns, b_columns}, a.options());
  tall_product({a, a_columns, a_columns}, {b, b_columns, b_columns}, rows, chunks, parts);
  return parts;
}

}  // namespace ss2d
}  // namespace mmvmamba

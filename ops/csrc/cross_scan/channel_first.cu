// Cross-scan and cross-merge, channel-first. A block owns a few whole planes if they fit in shared memory, and moves
// up to 16 bytes a thread: row routes from registers, column routes through shared memory. Of larger planes it owns a
// tile, read and written by rows and by columns. Moves x once and y once.
#include <algorithm>

#include "cross_scan/common.cuh"

namespace mmvmamba {
namespace cross {
namespace {

constexpr int kTile = 64, kWarps = 8;

struct Tile {
  int64_t plane;  // of batch * channels
  int row, column, rows, columns;

  __device__ __forceinline__ Tile(int height, int width) {
    const int across = ceil_div(width, kTile), tiles = across * ceil_div(height, kTile);
    plane = blockIdx.x / tiles;
    const int tile = blockIdx.x % tiles;
    row = tile / across * kTile, column = tile % across * kTile;
    rows = min(kTile, height - row), columns = min(kTile, width - column);
  }
};

// Calls function(row, column) for every pixel of the tile, consecutive lanes along rows (or columns).
template <typename F>
__device__ __forceinline__ void each_by_row(const Tile& tile, F function) {
  for (int r = threadIdx.x / 32; r < tile.rows; r += kWarps) {
    for (int c = threadIdx.x % 32; c < tile.columns; c += 32) function(r, c);
  }
}
template <typename F>
__device__ __forceinline__ void each_by_column(const Tile& tile, F function) {
  for (int c = threadIdx.x / 32; c < tile.columns; c += kWarps) {
    for (int r = threadIdx.x % 32; r < tile.rows; r += 32) function(r, c);
  }
}

// A row of the tile is an odd number of words, so that columns meet no bank conflicts.
template <typename T>
constexpr int kPitch = kTile + (sizeof(T) == 2 ? 2 : 1);

template <typename T>
struct ScanKernel {
  static constexpr int kThreads = 32 * kWarps, kBlocks = 0;

  static __device__ __forceinline__ void run(const T* x, T* y, Map map, Routes routes) {
    __shared__ T values[kTile][kPitch<T>];
    const Tile tile(map.height, map.width);
    const int64_t length = static_cast<int64_t>(map.height) * map.width;
    const T* from = x + tile.plane * length;
    each_by_row(tile, [&](int r, int c) { values[r][c] = from[(tile.row + r) * map.width + tile.column + c]; });
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRoutes; ++k) {
      const bool by_column = routes.column >> k & 1, reverse = routes.reverse >> k & 1;
      T* to = y + ((tile.plane / map.channels * kRoutes + k) * map.channels + tile.plane % map.channels) * length;
      const auto write = [&](int r, int c) {
        to[step_of(tile.row + r, tile.column + c, map.height, map.width, by_column, reverse)] = values[r][c];
      };
      if (by_column) {
        each_by_column(tile, write);
      } else {
        each_by_row(tile, write);
      }
    }
  }
};

template <typename T>
struct MergeKernel {
  using acc_t = Wide<T>;
  static constexpr int kThreads = 32 * kWarps, kBlocks = 0;

  static __device__ __forceinline__ void run(const T* y, T* x, Map map, Routes routes) {
    __shared__ acc_t values[kTile][kPitch<acc_t>];
    const Tile tile(map.height, map.width);
    const int64_t length = static_cast<int64_t>(map.height) * map.width;
    const T* from = y + (tile.plane / map.channels * kRoutes * map.channels + tile.plane % map.channels) * length;
    const auto sum = [&](int r, int c, unsigned mask) {
      acc_t total = 0;
#pragma unroll
      for (int k = 0; k < kRoutes; ++k) {
        if (mask >> k & 1) {
          const int step = step_of(tile.row + r, tile.column + c, map.height, map.width, routes.column >> k & 1,
                                   routes.reverse >> k & 1);
          total += widen(from[k * map.channels * length + step]);
        }
      }
      return total;
    };
    if (routes.column) {
      each_by_column(tile, [&](int r, int c) { values[r][c] = sum(r, c, routes.column); });
      __syncthreads();
    }
    T* to = x + tile.plane * length;
    each_by_row(tile, [&](int r, int c) {
      const acc_t total = sum(r, c, ~routes.column) + (routes.column ? values[r][c] : acc_t(0));
      to[(tile.row + r) * map.width + tile.column + c] = narrow<T>(total);
    });
  }
};

// Whole planes. `pitch` is the distance of rows in shared memory.
struct Planes {
  int64_t total;  // batch * channels
  int per_block, pitch;
};

// A position of a column route, and the cell of shared memory that holds it; advances by one step.
struct ColumnCursor {
  int row, column, height;
  __device__ __forceinline__ ColumnCursor(int step, int height_)
      : row(step % height_), column(step / height_), height(height_) {}
  __device__ __forceinline__ void advance() {
    if (++row == height) row = 0, ++column;
  }
};

template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> reversed(const Vector<T, kWidth>& from) {
  Vector<T, kWidth> to;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) to.values[j] = from.values[kWidth - 1 - j];
  return to;
}

// Calls function(plane of the block, plane of all, first step) for every vector of the block's planes.
template <int kWidth, typename F>
__device__ __forceinline__ void each_vector(const Planes& planes, int length, F function) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * planes.per_block;
  const int count = static_cast<int>(min(static_cast<int64_t>(planes.per_block), planes.total - first));
  const int vectors = length / kWidth;
  for (int i = threadIdx.x; i < count * vectors; i += blockDim.x) {
    function(i / vectors, first + i / vectors, i % vectors * kWidth);
  }
}

template <typename T, int kWidth>
struct ScanPlanesKernel {
  static constexpr int kThreads = 32 * kWarps, kBlocks = 0;

  static __device__ __forceinline__ void run(const T* x, T* y, Map map, Routes routes, Planes planes) {
    T* cells = shared_memory<T>();
    using V = Vector<T, kWidth>;
    const int length = map.height * map.width, plane_cells = map.height * planes.pitch;
    const auto write = [&](int64_t plane, int step, const V& value, bool columns) {
#pragma unroll
      for (int k = 0; k < kRoutes; ++k) {
        if ((routes.column >> k & 1) != columns) continue;
        T* to = y + ((plane / map.channels * kRoutes + k) * map.channels + plane % map.channels) * length;
        const bool reverse = routes.reverse >> k & 1;
        *reinterpret_cast<V*>(to + (reverse ? length - kWidth - step : step)) = reverse ? reversed(value) : value;
      }
    };
    each_vector<kWidth>(planes, length, [&](int own, int64_t plane, int step) {
      const V value = *reinterpret_cast<const V*>(x + plane * length + step);
      write(plane, step, value, false);
      if (!routes.column) return;
      int row = step / map.width, column = step % map.width;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        cells[own * plane_cells + row * planes.pitch + column] = value.values[j];
        if (++column == map.width) column = 0, ++row;
      }
    });
    if (!routes.column) return;
    __syncthreads();
    each_vector<kWidth>(planes, length, [&](int own, int64_t plane, int step) {
      V value;
      ColumnCursor at(step, map.height);
#pragma unroll
      for (int j = 0; j < kWidth; ++j, at.advance()) {
        value.values[j] = cells[own * plane_cells + at.row * planes.pitch + at.column];
      }
      write(plane, step, value, true);
    });
  }
};

template <typename T, int kWidth>
struct MergePlanesKernel {
  using acc_t = Wide<T>;
  static constexpr int kThreads = 32 * kWarps, kBlocks = 0;

  static __device__ __forceinline__ void run(const T* y, T* x, Map map, Routes routes, Planes planes) {
    acc_t* cells = shared_memory<acc_t>();
    using V = Vector<T, kWidth>;
    const int length = map.height * map.width, plane_cells = map.height * planes.pitch;
    const auto add = [&](int64_t plane, int step, bool columns, acc_t(&total)[kWidth]) {
#pragma unroll
      for (int k = 0; k < kRoutes; ++k) {
        if ((routes.column >> k & 1) != columns) continue;
        const T* from = y + ((plane / map.channels * kRoutes + k) * map.channels + plane % map.channels) * length;
        const bool reverse = routes.reverse >> k & 1;
        V value = *reinterpret_cast<const V*>(from + (reverse ? length - kWidth - step : step));
        if (reverse) value = reversed(value);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) total[j] += widen(value.values[j]);
      }
    };
    if (routes.column) {
      each_vector<kWidth>(planes, length, [&](int own, int64_t plane, int step) {
        acc_t total[kWidth] = {};
        add(plane, step, true, total);
        ColumnCursor at(step, map.height);
#pragma unroll
        for (int j = 0; j < kWidth; ++j, at.advance()) {
          cells[own * plane_cells + at.row * planes.pitch + at.column] = total[j];
        }
      });
      __syncthreads();
    }
    each_vector<kWidth>(planes, length, [&](int own, int64_t plane, int step) {
      acc_t total[kWidth] = {};
      add(plane, step, false, total);
      int row = step / map.width, column = step % map.width;
      V result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (routes.column) total[j] += cells[own * plane_cells + row * planes.pitch + column];
        result.values[j] = narrow<T>(total[j]);
        if (++column == map.width) column = 0, ++row;
      }
      *reinterpret_cast<V*>(x + plane * length + step) = result;
    });
  }
};

int64_t tiles_of(Map map) {
  return map.batch * map.channels * ceil_div(map.height, kTile) * ceil_div(map.width, kTile);
}

constexpr size_t kSharedBytes = 48 << 10;  // what a block may use without asking

// How whole planes are divided among blocks, with cells of `cell` bytes; none if not even one plane fits.
Planes planes_of(Map map, int cell, int width) {
  const int64_t total = map.batch * map.channels;
  // rows an odd number of words apart, so that a column's cells lie in different banks
  const int pitch = cell >= 4 ? map.width | 1 : (map.width + 1) / 2 * 2 + ((map.width + 1) / 2 % 2 ? 0 : 2);
  const int64_t vectors = static_cast<int64_t>(map.height) * map.width / width;
  const int64_t fit = kSharedBytes / (static_cast<int64_t>(map.height) * pitch * cell);
  return {total, static_cast<int>(std::min(fit, 2 * 32 * kWarps / std::max<int64_t>(vectors, 1) + 1)), pitch};
}

template <typename T, int kWidth>
bool scan_planes(const void* x, void* y, Map map, Routes routes, cudaStream_t stream) {
  const auto bits = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y);
  const Planes planes = planes_of(map, sizeof(T), kWidth);
  if (planes.per_block == 0 || map.height * map.width % kWidth || bits % (sizeof(T) * kWidth)) return false;
  const size_t bytes = planes.per_block * map.height * planes.pitch * sizeof(T);
  launch<ScanPlanesKernel<T, kWidth>>(ceil_div(planes.total, planes.per_block), 32 * kWarps, bytes, stream,
                                      static_cast<const T*>(x), static_cast<T*>(y), map, routes, planes);
  return true;
}

template <typename T>
void scan(const void* x, void* y, Map map, Routes routes, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  if (scan_planes<T, kWidth>(x, y, map, routes, stream) || scan_planes<T, kWidth / 2>(x, y, map, routes, stream))
    return;
  if (scan_planes<T, 1>(x, y, map, routes, stream)) return;
  launch<ScanKernel<T>>(tiles_of(map), 32 * kWarps, 0, stream, static_cast<const T*>(x), static_cast<T*>(y), map,
                        routes);
}

template <typename T, int kWidth>
bool merge_planes(const void* y, void* x, Map map, Routes routes, cudaStream_t stream) {
  const auto bits = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y);
  const Planes planes = planes_of(map, sizeof(Wide<T>), kWidth);
  if (planes.per_block == 0 || map.height * map.width % kWidth || bits % (sizeof(T) * kWidth)) return false;
  const size_t bytes = planes.per_block * map.height * planes.pitch * sizeof(Wide<T>);
  launch<MergePlanesKernel<T, kWidth>>(ceil_div(planes.total, planes.per_block), 32 * kWarps, bytes, stream,
                                       static_cast<const T*>(y), static_cast<T*>(x), map, routes, planes);
  return true;
}

template <typename T>
void merge(const void* y, void* x, Map map, Routes routes, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  if (merge_planes<T, kWidth>(y, x, map, routes, stream)) return;
  if (merge_planes<T, kWidth / 2>(y, x, map, routes, stream)) return;
  if (merge_planes<T, 1>(y, x, map, routes, stream)) return;
  launch<MergeKernel<T>>(tiles_of(map), 32 * kWarps, 0, stream, static_cast<const T*>(y), static_cast<T*>(x), map,
                         routes);
}

}  // namespace

void launch_scan(const void* x, void* y, int element_size, Map map, Routes routes, cudaStream_t stream) {
  if (element_size == 2) {
    scan<uint16_t>(x, y, map, routes, stream);
  } else if (element_size == 4) {
    scan<uint32_t>(x, y, map, routes, stream);
  } else {
    scan<uint64_t>(x, y, map, routes, stream);
  }
}

void launch_merge(const void* y, void* x, Type type, Map map, Routes routes, cudaStream_t stream) {
  if (type == Type::kDouble) return merge<double>(y, x, map, routes, stream);
  with_type(type, [&](auto t) { merge<decltype(t)>(y, x, map, routes, stream); });
}

}  // namespace cross
}  // namespace mmvmamba

// Launch interface of the cross-scan kernels. No torch types in here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/element_type.h"
#include "common/routes.h"

namespace mmvmamba {
namespace cross {

// Sizes of (batch, channels, height, width), or (batch, height, width, channels) if channel-last.
struct Map {
  int64_t batch, channels;
  int height, width;
};

// x (batch, channels, length) -> y (batch, 4, channels, length); element_size is 2, 4 or 8 bytes.
void launch_scan(const void* x, void* y, int element_size, Map map, Routes routes, cudaStream_t stream);
// x (batch, length, channels) -> y (batch, length, 4, channels)
void launch_scan_last(const void* x, void* y, int element_size, Map map, Routes routes, cudaStream_t stream);

// The adjoints: y -> x, half precision added in float.
void launch_merge(const void* y, void* x, Type type, Map map, Routes routes, cudaStream_t stream);
void launch_merge_last(const void* y, void* x, Type type, Map map, Routes routes, cudaStream_t stream);

}  // namespace cross
}  // namespace mmvmamba

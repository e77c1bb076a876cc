#include "ss2d/forward.cuh"
#include "ss2d/instantiate.cuh"

MMVMAMBA_SS2D_FORWARD(half, __half)

#include "ss2d_forward.cuh"
#include "ss2d_instantiate.cuh"

MMVMAMBA_SS2D_FORWARD(half, __half)

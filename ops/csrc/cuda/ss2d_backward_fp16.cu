#include "ss2d_backward.cuh"
#include "ss2d_instantiate.cuh"

MMVMAMBA_SS2D_BACKWARD(half, __half)

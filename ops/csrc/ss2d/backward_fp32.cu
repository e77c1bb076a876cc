#include "ss2d/backward.cuh"
#include "ss2d/instantiate.cuh"

MMVMAMBA_SS2D_BACKWARD(float, float)

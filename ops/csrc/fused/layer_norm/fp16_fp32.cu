#include "fused/layer_norm/kernels.cuh"

template struct mmvmamba::norm::Kernels<__half, float>;

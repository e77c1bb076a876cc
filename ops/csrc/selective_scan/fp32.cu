#include "selective_scan/backward.cuh"
#include "selective_scan/forward.cuh"

template struct mmvmamba::scan::Kernels<float>;

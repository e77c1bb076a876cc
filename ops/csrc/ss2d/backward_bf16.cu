#include "ss2d/backward.cuh"

template struct mmvmamba::ss2d::Backward<__nv_bfloat16>;

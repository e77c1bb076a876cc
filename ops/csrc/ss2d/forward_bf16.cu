#include "ss2d/forward.cuh"

template struct mmvmamba::ss2d::Forward<__nv_bfloat16>;

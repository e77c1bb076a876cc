#include "selective_scan/instantiate.cuh"

MMVMAMBA_SCAN_INSTANTIATE(bfloat16, __nv_bfloat16)

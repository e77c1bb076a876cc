#include "selective_scan_instantiate.cuh"

MMVMAMBA_SCAN_INSTANTIATE(float, float)

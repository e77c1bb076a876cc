#include "selective_scan/instantiate.cuh"

MMVMAMBA_SCAN_INSTANTIATE(float, float)

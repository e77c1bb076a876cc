// Names of the 16-bit types, which the emulated kernels are not run on.
#pragma once

struct __half;
struct __nv_bfloat16;

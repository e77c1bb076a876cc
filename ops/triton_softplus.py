"""The polynomials of softplus in Triton, those of ``csrc/common/softplus_coefficients.h`` (a test compares)."""

import math

import triton
import triton.language as tl

# log1p(z) / z on [0, 1], from the highest power of z down, for float32 and for values of 16 bits
LOG1P_FLOAT = (
    5.364826415e-3, -3.006580099e-2, 7.920455188e-2, -1.375380307e-1, 1.915365607e-1,
    -2.485716343e-1, 3.332132399e-1, -4.999964833e-1, 1.0,
)  # fmt: skip
LOG1P_HALF = (4.135079751e-2, -1.574346196e-1, 3.063057315e-1, -4.969787329e-1, 9.999433020e-1)

_F0, _F1, _F2, _F3, _F4, _F5, _F6, _F7, _F8 = (tl.constexpr(c) for c in LOG1P_FLOAT)
_H0, _H1, _H2, _H3, _H4 = (tl.constexpr(c) for c in LOG1P_HALF)
_LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def log1p_ratio(z, BASE_TWO: tl.constexpr = False, HALF: tl.constexpr = False):
    """log1p(z) / z, or in base two log2(1 + z) / z."""
    s: tl.constexpr = _LOG2E if BASE_TWO else 1.0
    if HALF:
        p = z * (_H0 * s) + (_H1 * s)
        p = p * z + (_H2 * s)
        p = p * z + (_H3 * s)
        p = p * z + (_H4 * s)
    else:
        p = z * (_F0 * s) + (_F1 * s)
        p = p * z + (_F2 * s)
        p = p * z + (_F3 * s)
        p = p * z + (_F4 * s)
        p = p * z + (_F5 * s)
        p = p * z + (_F6 * s)
        p = p * z + (_F7 * s)
        p = p * z + (_F8 * s)
    return p

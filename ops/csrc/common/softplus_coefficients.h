// log1p(z) / z on [0, 1] as a polynomial, from the highest power of z down: on a GPU, softplus(x) is max(x, 0) +
// log1p(exp(-|x|)). One a precision, here and in ops/triton_softplus.py, which a test compares. Minimax for the
// relative error: 3e-8, or 6e-5 for values of 16 bits. The last coefficient of the first is 1 exactly, so that it has
// no error of its own when the whole is multiplied by log2(e).
#pragma once

namespace mmvmamba {

constexpr double kLog1pFloat[] = {5.364826415e-3,  -3.006580099e-2, 7.920455188e-2,
                                  -1.375380307e-1, 1.915365607e-1,  -2.485716343e-1,
                                  3.332132399e-1,  -4.999964833e-1, 1.0};
constexpr double kLog1pHalf[] = {4.135079751e-2, -1.574346196e-1, 3.063057315e-1, -4.969787329e-1, 9.999433020e-1};

}  // namespace mmvmamba

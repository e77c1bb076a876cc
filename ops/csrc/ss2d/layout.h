// How the CUDA kernels lay out the projections and the states, which Python must know. Neither torch nor CUDA in here.
#pragma once

namespace mmvmamba {
namespace ss2d {

constexpr int kSegment = 16;  // pixels that one thread scans, and between two saved states
constexpr int kGroup = 32;    // channels are padded to a multiple
constexpr int kRanks[] = {6, 12}, kRankColumns[] = {8, 16};  // dt ranks with kernels of their own, and their columns
constexpr int kColumnStep = 16;                              // columns of other ranks are a multiple

}  // namespace ss2d
}  // namespace mmvmamba

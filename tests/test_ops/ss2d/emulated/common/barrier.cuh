#pragma once

namespace mmvmamba {
inline void barrier_of(int name, int threads) { emulated::Block::now()->wait(name, threads); }
}  // namespace mmvmamba

// A GPU's block on the host, for tests of kernels: each thread is a fibre, and one runs at a time, up to where it must
// wait for others. What a thread must share by a barrier or a shuffle it does share by one, or others miss it: fibres
// run in any order that the seed says.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline

struct Index {
  int x;
};
using cudaStream_t = void*;

namespace emulated {

inline Index thread, block, block_size;  // of the fibre that runs

struct Block {
  struct Fibre {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false, waits = false;
    std::vector<std::function<void()>> copies;  // that are under way
  };
  // Threads that wait at a barrier of one name, for so many.
  struct Barrier {
    std::vector<int> waiting;
  };
  std::vector<Fibre> fibres;
  std::map<int, Barrier> barriers;
  std::vector<float> shuffled, received;
  std::vector<char> memory;
  ucontext_t scheduler;
  int current = 0;
  std::mt19937 random;
  std::function<void()> body;

  static Block*& now() {
    static Block* block = nullptr;
    return block;
  }

  static void enter() {
    now()->body();
    now()->fibres[now()->current].done = true;
    swapcontext(&now()->fibres[now()->current].context, &now()->scheduler);
  }

  Block(int threads, int bytes, unsigned seed) : fibres(threads), shuffled(threads), received(threads), random(seed) {
    memory.assign(bytes, static_cast<char>(0xff));  // not a number
  }

  // Wait until `threads` threads are at the barrier `name`.
  void wait(int name, int threads) {
    Barrier& barrier = barriers[name];
    barrier.waiting.push_back(current);
    if (static_cast<int>(barrier.waiting.size()) == threads) {
      for (int i : barrier.waiting) fibres[i].waits = false;
      barrier.waiting.clear();
      return;
    }
    fibres[current].waits = true;
    swapcontext(&fibres[current].context, &scheduler);
    thread.x = current;
  }

  void copy(const std::function<void()>& function) {
    if (random() % 2) {
      function();
    } else {
      fibres[current].copies.push_back(function);
    }
  }
  void finish_copies() {
    for (const auto& function : fibres[current].copies) function();
    fibres[current].copies.clear();
  }

  void run(const std::function<void()>& function) {
    now() = this, body = function, block_size.x = static_cast<int>(fibres.size());
    for (Fibre& fibre : fibres) {
      fibre.stack.resize(64 << 10);
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data();
      fibre.context.uc_stack.ss_size = fibre.stack.size();
      fibre.context.uc_link = nullptr;
      makecontext(&fibre.context, enter, 0);
    }
    std::vector<int> ready;
    for (;;) {
      ready.clear();
      bool all_done = true;
      for (size_t i = 0; i < fibres.size(); ++i) {
        all_done = all_done && fibres[i].done;
        if (!fibres[i].done && !fibres[i].waits) ready.push_back(static_cast<int>(i));
      }
      if (all_done) return;
      if (ready.empty()) {
        std::fprintf(stderr, "emulated block: every thread waits\n");
        std::abort();
      }
      std::shuffle(ready.begin(), ready.end(), random);
      for (int i : ready) {
        current = i, thread.x = i;
        swapcontext(&scheduler, &fibres[i].context);
      }
    }
  }
};

constexpr int kWarpBarrier = 1000;  // of the first warp; those of the kernels are below

inline float exchange(float value, int lane_mask) {
  Block& block = *Block::now();
  const int own = block.current, warp = own / 32;
  block.shuffled[own] = value;
  block.wait(kWarpBarrier + warp, 32);
  const float result = block.shuffled[own ^ lane_mask];
  block.wait(kWarpBarrier + warp, 32);
  return result;
}

// Run Body on a grid.
template <typename Body, typename... Values>
void launch(int64_t blocks, int threads, int bytes, unsigned seed, const Values&... values) {
  for (int64_t i = 0; i < blocks; ++i) {
    block.x = static_cast<int>(i);
    Block(threads, bytes, seed + static_cast<unsigned>(i)).run([&] { Body::run(values...); });
  }
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define blockDim emulated::block_size

inline void __syncthreads() { emulated::Block::now()->wait(0, emulated::block_size.x); }
inline void __syncwarp() {
  emulated::Block::now()->wait(emulated::kWarpBarrier + emulated::Block::now()->current / 32, 32);
}
inline float __shfl_xor_sync(unsigned, float value, int lane_mask) { return emulated::exchange(value, lane_mask); }

using std::max;
using std::min;

// Runs CUDA kernels on the CPU, for tests/test_emulated.py: the threads of a block as fibers, which change at barriers
// and shuffles only, and one block after another. Finds wrong results, wrong barriers and threads that never meet, not
// races: between two barriers the threads of a block run in their order.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __device__
#undef __global__
#undef __launch_bounds__
#undef __restrict__
#undef __shared__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static  // one block at a time

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class Waits { No, ForWarp, ForBlock };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  Waits waits;
  bool is_done;
  dim3 thread;
  unsigned long long shuffled;  // the bits that the thread gives to others
};

inline std::vector<Fiber> fibers;
inline size_t current;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel;
inline dim3 block, blocks, threads;

inline void pause(Waits waits) {
  fibers[current].waits = waits;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void enter() {
  (*kernel)();
  fibers[current].is_done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

// Whether fibers from begin to end all wait for the same; those go on.
inline bool release(size_t begin, size_t end, Waits what) {
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].is_done || fibers[i].waits != what) {
      return false;
    }
  }
  for (size_t i = begin; i < end; ++i) {
    fibers[i].waits = Waits::No;
  }
  return true;
}

inline void run_block() {
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.waits = Waits::No;
    fiber.is_done = false;
    fiber.thread = dim3(unsigned(i) % threads.x, unsigned(i) / threads.x);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
    makecontext(&fiber.context, enter, 0);
  }
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (current = 0; current < fibers.size(); ++current) {
      if (!fibers[current].is_done && fibers[current].waits == Waits::No) {
        swapcontext(&scheduler, &fibers[current].context);
      }
    }
    for (size_t i = 0; i < fibers.size(); i += kWarp) {
      goes_on |= release(i, i + kWarp, Waits::ForWarp);
    }
    goes_on = goes_on || release(0, fibers.size(), Waits::ForBlock);
  }
  for (const Fiber& fiber : fibers) {
    if (!fiber.is_done) {
      std::puts("emulated: some threads of a block wait for others that are done or wait elsewhere");
      std::abort();
    }
  }
}

inline void launch(dim3 grid, dim3 block_threads, const std::function<void()>& body) {
  kernel = &body;
  blocks = grid;
  threads = block_threads;
  fibers.resize(size_t(threads.x) * threads.y);
  for (block.y = 0; block.y < blocks.y; ++block.y) {
    for (block.x = 0; block.x < blocks.x; ++block.x) {
      run_block();
    }
  }
}

}  // namespace emulated

#define blockIdx emulated::block
#define gridDim emulated::blocks
#define blockDim emulated::threads
#define threadIdx (emulated::fibers[emulated::current].thread)

inline void __syncthreads() { emulated::pause(emulated::Waits::ForBlock); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  static_assert(sizeof(T) <= sizeof(unsigned long long), "expected a value of at most 8 bytes");
  std::memcpy(&emulated::fibers[emulated::current].shuffled, &value, sizeof(T));
  emulated::pause(emulated::Waits::ForWarp);
  T result;
  std::memcpy(&result, &emulated::fibers[emulated::current ^ size_t(distance)].shuffled, sizeof(T));
  emulated::pause(emulated::Waits::ForWarp);  // until all have read
  return result;
}

inline float __expf(float x) { return std::exp(x); }
inline void __stcs(float4* address, float4 value) { *address = value; }

// Runs CUDA kernels on the CPU, for tests/test_emulated.py: the threads of a block as fibers, which change at barriers
// and shuffles only, and one block after another, between two barriers of the grid where those meet. Finds wrong
// results, wrong barriers and threads that never meet, not races: between two barriers the threads of a block run in
// their order.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __device__
#undef __global__
#undef __grid_constant__
#undef __launch_bounds__
#undef __noinline__
#undef __restrict__
#undef __shared__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__
#define __restrict__ __restrict
#define __shared__ static  // one block at a time, which keeps nothing there at barriers of the grid

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr int kMultiprocessors = 18;

enum class Waits { No, ForWarp, ForBlock, ForGrid };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
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

inline size_t block_threads() { return size_t(threads.x) * threads.y; }

// The fibers of one block from number begin on, until all are done or wait for other blocks.
inline void run_block(size_t begin) {
  const size_t end = begin + block_threads();
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (current = begin; current < end; ++current) {
      if (!fibers[current].is_done && fibers[current].waits == Waits::No) {
        swapcontext(&scheduler, &fibers[current].context);
      }
    }
    for (size_t i = begin; i < end; i += kWarp) {
      goes_on |= release(i, i + kWarp, Waits::ForWarp);
    }
    goes_on = goes_on || release(begin, end, Waits::ForBlock);
  }
}

// The blocks that `fibers` has room for, the first of which is `block`.
inline void run_blocks() {
  const dim3 first = block;
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.waits = Waits::No;
    fiber.is_done = false;
    fiber.thread = dim3(unsigned(i % block_threads()) % threads.x, unsigned(i % block_threads()) / threads.x);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    makecontext(&fiber.context, enter, 0);
  }
  do {
    for (size_t i = 0; i < fibers.size(); i += block_threads()) {
      block.x = first.x + unsigned(i / block_threads());
      run_block(i);
    }
  } while (release(0, fibers.size(), Waits::ForGrid));
  block = first;
  for (const Fiber& fiber : fibers) {
    if (!fiber.is_done) {
      std::puts("emulated: some threads wait for others that are done or wait elsewhere");
      std::abort();
    }
  }
}

inline void prepare(dim3 grid, dim3 block_threads, const std::function<void()>& body) {
  kernel = &body;
  block = dim3(0, 0);
  blocks = grid;
  threads = block_threads;
}

inline void launch(dim3 grid, dim3 block_threads, const std::function<void()>& body) {
  prepare(grid, block_threads, body);
  fibers.resize(emulated::block_threads());
  for (block.y = 0; block.y < blocks.y; ++block.y) {
    for (block.x = 0; block.x < blocks.x; ++block.x) {
      run_blocks();
    }
  }
}

// All blocks at once.
template <typename Argument>
cudaError_t launch_cooperative(void (*kernel)(Argument), dim3 grid, dim3 block_threads, void** arguments, size_t,
                               cudaStream_t) {
  const std::function<void()> body = [&] { kernel(*static_cast<std::decay_t<Argument>*>(arguments[0])); };
  prepare(grid, block_threads, body);
  fibers.resize(grid.x * emulated::block_threads());
  run_blocks();
  return cudaSuccess;
}

inline cudaError_t get_attribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : 1;
  return cudaSuccess;
}

inline cudaError_t is_capturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

}  // namespace emulated

#define cudaLaunchCooperativeKernel emulated::launch_cooperative
#define cudaDeviceGetAttribute emulated::get_attribute
#define cudaStreamIsCapturing emulated::is_capturing
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
inline float __ldcg(const float* address) { return *address; }

// What the CUDA kernels share: the current stream, 16-byte memory accesses, and reductions over the threads of a warp
// or a block. The reductions combine in an order that is fixed by the shape of the block, so that their bits do not
// change from run to run.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

#include "../tensor.h"
#include "launch.h"

namespace torch_mlp {

using torch::stable::accelerator::DeviceGuard;

// The stream on which torch runs the operators on the device of self; a DeviceGuard for that device is held.
inline cudaStream_t current_stream(const Tensor& self) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(self.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// --- 16-byte accesses ---

template <typename scalar_t, int width>
struct alignas(sizeof(scalar_t) * width) Pack {
  scalar_t values[width];
};

template <int width, typename scalar_t>
__device__ Pack<scalar_t, width> load(const scalar_t* row, PackIndex<width> at) {
  return reinterpret_cast<const Pack<scalar_t, width>*>(row + at.head)[at.number];
}

template <int width, typename scalar_t>
__device__ void store(scalar_t* row, PackIndex<width> at, const Pack<scalar_t, width>& pack) {
  reinterpret_cast<Pack<scalar_t, width>*>(row + at.head)[at.number] = pack;
}

// The same of what nobody reads soon: it leaves the cache to what is read again.
template <int width, typename scalar_t>
__device__ void store_streaming(scalar_t* row, PackIndex<width> at, const Pack<scalar_t, width>& pack) {
  if constexpr (sizeof(pack) == sizeof(float4)) {
    __stcs(reinterpret_cast<float4*>(row + at.head) + at.number, reinterpret_cast<const float4&>(pack));
  } else {
    store(row, at, pack);
  }
}

// --- reductions ---

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The maximum of what is not NaN.
struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return std::fmax(a, b);
  }
};

// Combines the values of `lanes` adjacent threads, a power of two up to a warp; each of them gets the result. The whole
// warp has to call it.
template <int lanes, typename T, typename Combine>
__device__ T warp_reduce(T value, const Combine& combine) {
  static_assert(lanes <= kWarpThreads && (lanes & (lanes - 1)) == 0, "expected a power of two up to a warp");
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Combines the values of all threads of a block; each of them gets the result.
template <int threads = kThreads, typename T, typename Combine>
__device__ T block_reduce(T value, const Combine& combine) {
  constexpr int warps = threads / kWarpThreads;
  __shared__ T of_warp[warps];
  value = warp_reduce<kWarpThreads>(value, combine);
  __syncthreads();  // the threads may still be reading the results of an earlier call
  if (threadIdx.x % kWarpThreads == 0) {
    of_warp[threadIdx.x / kWarpThreads] = value;
  }
  __syncthreads();
  return warp_reduce<warps>(of_warp[threadIdx.x % warps], combine);
}

// Combines the values of `lanes` adjacent threads, part of a warp or the whole block.
template <int lanes, typename T, typename Combine>
__device__ T lanes_reduce(T value, const Combine& combine) {
  if constexpr (lanes > kWarpThreads) {
    return block_reduce<lanes>(value, combine);
  } else {
    return warp_reduce<lanes>(value, combine);
  }
}

// One block: the sum of some values, divided.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* __restrict__ values, scalar_t* __restrict__ result, int64_t count, double divisor) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += values[i];
  }
  sum = block_reduce(sum, Add{});
  if (threadIdx.x == 0) {
    *result = static_cast<scalar_t>(static_cast<compute_t<scalar_t>>(sum / divisor));
  }
}

}  // namespace torch_mlp

// linear_act on CUDA.
//
//   forward     z = x W^T + b              y = act(z)
//   backward    gz = gy * act'(z), from y  gx = gz W    gW = gz^T x    gb = sum over the batch of gz
//
// Shapes: x (batch, in_features), W (out_features, in_features), b (out_features,), y (batch, out_features); leading
// dimensions are folded into the batch.
// Fused: the GEMM adds the bias, one kernel activates in place; gz and gb come from one sweep over gy and y. The three
// GEMMs are the library's.
// Threads: forward, one 16-byte access each. Backward, neighbouring threads hold neighbouring columns and walk down the
// rows of their block with a sum per column in registers; the blocks' sums are then added by a second kernel. How the
// rows are split depends on the shape alone, so that the bits of gb are the same in every run.
#include "../activation.h"
#include "../linear_act.h"
#include "common.cuh"

namespace torch_mlp {
namespace {

// Blocks that keep every multiprocessor busy to the end; more would only make more partial sums of gb.
constexpr int64_t kFullGrid = 2048;
constexpr int64_t kMinRowsPerThread = 8;

// The columns that a block adds the partial sums of: few, so that many threads share the long way down.
constexpr int64_t kSumCols = 8;

// The blocks of the backward kernel that a multiprocessor has to hold at once. Left to itself, the compiler would save
// so many registers that it spills.
constexpr int kMinBlocks = 5;

template <typename Activation, typename scalar_t>
__global__ void __launch_bounds__(kThreads) activation_kernel(scalar_t* y, int phase, int64_t count) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for_each_pack<scalar_t, 1>(phase, count, thread, int64_t(gridDim.x) * kThreads, [&](auto at) {
    auto pack = load(y, at);
#pragma unroll
    for (auto& value : pack.values) {
      value = Activation::forward(compute_t<scalar_t>(value));
    }
    store(y, at, pack);
  });
}

// Adds the sums of the threads that share threadIdx.x; those of row 0 get the result.
template <int width, typename T>
__device__ void sum_over_thread_rows(T (&sums)[width]) {
  __shared__ T shared[width][kThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < width; ++j) {
    shared[j][thread] = sums[j];
  }
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        shared[j][thread] += shared[j][thread + half * blockDim.x];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < width; ++j) {
    sums[j] = shared[j][thread];
  }
}

// gz[i, j] = gy[i, j] * act'(z[i, j]) where gz is wanted, partials[block, j] = sum over the block's rows i of it where
// gb is wanted (null otherwise). A grid of one row of blocks writes gb itself.
template <typename Activation, int width, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    activation_backward_kernel(const scalar_t* __restrict__ gy, const scalar_t* __restrict__ y,
                               scalar_t* __restrict__ gz, scalar_t* __restrict__ gb,
                               compute_t<scalar_t>* __restrict__ partials, int64_t rows, int64_t cols,
                               int64_t block_rows) {
  using compute = compute_t<scalar_t>;
  const int64_t packs = cols / width, col = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t begin = blockIdx.y * block_rows, end = begin + block_rows < rows ? begin + block_rows : rows;
  compute sums[width] = {};
  if (col < packs) {
#pragma unroll 2
    for (int64_t k = (begin + threadIdx.y) * packs + col; k < end * packs; k += blockDim.y * packs) {
      const PackIndex<width> at{0, k};
      auto pack = load(gy, at);
      const auto of_y = load(y, at);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const compute value = Activation::backward(compute(pack.values[j]), compute(of_y.values[j]));
        pack.values[j] = value;
        sums[j] += value;
      }
      if (gz) {
        store(gz, at, pack);
      }
    }
  }
  if (gb) {
    sum_over_thread_rows(sums);
    if (threadIdx.y == 0 && col < packs) {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (gridDim.y == 1) {
          gb[col * width + j] = sums[j];
        } else {
          partials[blockIdx.y * cols + col * width + j] = sums[j];
        }
      }
    }
  }
}

// gb[j] = sum over the blocks of partials[block, j].
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) grad_bias_kernel(const compute_t<scalar_t>* __restrict__ partials,
                                                             scalar_t* __restrict__ gb, int64_t blocks, int64_t cols) {
  const int64_t col = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  double sums[1] = {};
  if (col < cols) {
#pragma unroll 8
    for (int64_t block = threadIdx.y; block < blocks; block += blockDim.y) {
      sums[0] += partials[block * cols + col];
    }
  }
  sum_over_thread_rows(sums);
  if (threadIdx.y == 0 && col < cols) {
    gb[col] = static_cast<scalar_t>(sums[0]);
  }
}

// kThreads in rows of at most a warp, no longer than there are columns.
dim3 block_shape(int64_t cols) {
  unsigned int width = 1;
  while (width < kWarpThreads && width < cols) {
    width *= 2;
  }
  return dim3(width, kThreads / width);
}

template <typename Activation, int width, typename scalar_t>
void launch_activation_backward(const scalar_t* gy, const scalar_t* y, scalar_t* gz, scalar_t* gb, int64_t rows,
                                int64_t cols, const Tensor& like) {
  using compute = compute_t<scalar_t>;
  const cudaStream_t stream = current_stream(like);
  const dim3 threads = block_shape(cols / width);
  const int64_t col_blocks = ceil_div(cols / width, threads.x);
  const int64_t most_row_blocks = ceil_div(rows, kMinRowsPerThread * threads.y);
  const int64_t row_blocks = std::max<int64_t>(1, std::min(ceil_div(kFullGrid, col_blocks), most_row_blocks));
  const int64_t block_rows = ceil_div(rows, row_blocks);

  const Tensor partials = empty({gb && row_blocks > 1 ? row_blocks * cols : 0},
                                torch::headeronly::CppTypeToScalarType<compute>::value, like);
  const dim3 grid(grid_of(col_blocks), grid_of(row_blocks));
  activation_backward_kernel<Activation, width>
      <<<grid, threads, 0, stream>>>(gy, y, gz, gb, partials.mutable_data_ptr<compute>(), rows, cols, block_rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (gb && row_blocks > 1) {
    const dim3 sum_threads = block_shape(std::min(cols, kSumCols));
    grad_bias_kernel<<<grid_of(ceil_div(cols, sum_threads.x)), sum_threads, 0, stream>>>(
        partials.const_data_ptr<compute>(), gb, row_blocks, cols);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <typename Activation, typename scalar_t>
void activate(const Tensor& output) {
  const int64_t count = output.numel(), packs = ceil_div(count, kPackWidth<scalar_t>);
  scalar_t* y = output.mutable_data_ptr<scalar_t>();
  activation_kernel<Activation>
      <<<grid_of(ceil_div(packs, kThreads)), kThreads, 0, current_stream(output)>>>(y, phase_of(y), count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Activation, typename scalar_t>
void activation_backward(const scalar_t* gy, const scalar_t* y, scalar_t* gz, scalar_t* gb, int64_t rows, int64_t cols,
                         const Tensor& like) {
  constexpr int width = kPackWidth<scalar_t>;
  if (cols % width == 0 && phase_of(gy) == 0 && phase_of(y) == 0 && phase_of(gz) == 0) {
    launch_activation_backward<Activation, width>(gy, y, gz, gb, rows, cols, like);
  } else {
    launch_activation_backward<Activation, 1>(gy, y, gz, gb, rows, cols, like);
  }
}

}  // namespace

Tensor linear_act_cuda(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::string& activation) {
  constexpr const char* op = "linear_act";
  check_linear_act(op, input, weight, bias);
  const DeviceGuard guard(input.get_device_index());
  std::vector<int64_t> output_sizes = sizes_of(input);
  output_sizes.back() = weight.size(0);
  Tensor output;
  dispatch_activation(op, activation, [&](auto act) {
    output = empty(output_sizes, input.scalar_type(), input);
    if (output.numel() == 0) {
      return;
    }
    matmul_out(as_matrix(output), as_matrix(input), transpose(weight), bias);
    if constexpr (!std::is_same_v<decltype(act), Identity>) {
      dispatch_floating(input.scalar_type(), [&](auto zero) { activate<decltype(act), decltype(zero)>(output); });
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_act_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& weight, const Tensor& output,
                                                            const std::string& activation, bool needs_grad_input,
                                                            bool needs_grad_weight, bool needs_grad_bias) {
  constexpr const char* op = "_linear_act_backward";
  check_linear_act_backward(op, grad_output, input, weight, output);
  const DeviceGuard guard(input.get_device_index());
  const ScalarType dtype = input.scalar_type();
  Tensor grad_input = empty(needs_grad_input ? sizes_of(input) : std::vector<int64_t>{0}, dtype, input);
  Tensor grad_weight = empty(needs_grad_weight ? sizes_of(weight) : std::vector<int64_t>{0}, dtype, input);
  Tensor grad_bias = empty({needs_grad_bias ? weight.size(0) : 0}, dtype, input);
  // An error that names the op its reader has called.
  dispatch_differentiable("linear_act", activation, [&](auto act) {
    dispatch_floating(dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      constexpr bool is_identity = std::is_same_v<decltype(act), Identity>;
      const Tensor gy = as_contiguous(as_matrix(grad_output));
      const Tensor y = as_contiguous(as_matrix(output));
      const bool needs_grad_z = needs_grad_input || needs_grad_weight;
      // The identity's gz is gy itself: nothing to write.
      const Tensor gz = is_identity || !needs_grad_z ? gy : empty(sizes_of(gy), dtype, input);
      if (gy.size(1) > 0 && (needs_grad_bias || (needs_grad_z && !is_identity))) {
        activation_backward<decltype(act), scalar_t>(
            gy.const_data_ptr<scalar_t>(), y.const_data_ptr<scalar_t>(),
            is_identity || !needs_grad_z ? nullptr : gz.mutable_data_ptr<scalar_t>(),
            needs_grad_bias ? grad_bias.mutable_data_ptr<scalar_t>() : nullptr, gy.size(0), gy.size(1), input);
      }
      if (needs_grad_input) {
        matmul_out(as_matrix(grad_input), gz, weight);
      }
      if (needs_grad_weight) {
        matmul_out(grad_weight, transpose(gz), as_matrix(input));
      }
    });
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA, m) {
  m.impl("linear_act", TORCH_BOX(&torch_mlp::linear_act_cuda));
  m.impl("_linear_act_backward", TORCH_BOX(&torch_mlp::linear_act_backward_cuda));
}

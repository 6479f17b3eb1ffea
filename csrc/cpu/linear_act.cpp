// linear_act on the CPU.
//
//   forward     z = x W^T + b              y = act(z)
//   backward    gz = gy * act'(z), from y  gx = gz W    gW = gz^T x    gb = sum over the batch of gz
//
// Shapes: x (batch, in_features), W (out_features, in_features), b (out_features,), y (batch, out_features); leading
// dimensions are folded into the batch.
// Fused: bias and activation follow the GEMM on a block of rows that is still in cache; gz and gb come from one sweep
// over gy and y. The three GEMMs are the library's.
// Threads: the GEMM's own; elementwise work is split by rows. gb is summed in blocks of rows whose number depends on
// the shape alone, so that its bits do not depend on the number of threads.
#include <algorithm>

#include "../activation.h"
#include "../tensor.h"

namespace torch_mlp {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

// A block of the output that stays in the second-level cache between the GEMM and the activation.
constexpr int64_t kCacheBlockBytes = 1 << 20;
constexpr int64_t kMinBlockRows = 256;  // fewer rows make the library pack the weight too often

// The partial sums of gb: at most this many, of at least so many rows each.
constexpr int64_t kMaxSumBlocks = 64;
constexpr int64_t kMinSumRows = 64;

// Sums of gb are wider than the values, for the batch may be long.
template <typename scalar_t>
using sum_t = std::conditional_t<sizeof(scalar_t) == 2, float, double>;

template <typename Activation, typename scalar_t>
void activate(scalar_t* y, int64_t count) {
  torch::stable::parallel_for(0, count, kElementsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      y[i] = Activation::forward(compute_t<scalar_t>(y[i]));
    }
  });
}

// gz[i, j] = gy[i, j] * act'(z[i, j]) where gz is wanted, gb[j] = sum_i of it where gb is wanted (null otherwise).
template <typename Activation, typename scalar_t>
void activation_backward(const scalar_t* gy, const scalar_t* y, scalar_t* gz, scalar_t* gb, int64_t rows,
                         int64_t cols) {
  const int64_t block_rows = std::max(kMinSumRows, ceil_div(rows, kMaxSumBlocks));
  const int64_t blocks = ceil_div(rows, block_rows);
  std::vector<sum_t<scalar_t>> sums(gb ? blocks * cols : 0);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, block_rows * cols));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * block_rows; i < std::min(end * block_rows, rows); ++i) {
      sum_t<scalar_t>* sum = gb ? sums.data() + i / block_rows * cols : nullptr;
      for (int64_t j = 0; j < cols; ++j) {
        const auto value =
            Activation::backward(compute_t<scalar_t>(gy[i * cols + j]), compute_t<scalar_t>(y[i * cols + j]));
        if (gz) {
          gz[i * cols + j] = value;
        }
        if (sum) {
          sum[j] += value;
        }
      }
    }
  });
  if (gb) {
    for (int64_t j = 0; j < cols; ++j) {
      sum_t<scalar_t> total = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        total += sums[block * cols + j];
      }
      gb[j] = static_cast<scalar_t>(total);
    }
  }
}

Tensor linear_act_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::string& activation) {
  constexpr const char* op = "linear_act";
  check_linear_act(op, input, weight, bias);
  std::vector<int64_t> output_sizes = sizes_of(input);
  output_sizes.back() = weight.size(0);
  Tensor output;
  dispatch_activation(op, activation, [&](auto act) {
    output = empty(output_sizes, input.scalar_type(), input);
    if (output.numel() == 0) {
      return;
    }
    dispatch_floating(input.scalar_type(), [&](auto zero) {
      using scalar_t = decltype(zero);
      const Tensor x = as_matrix(input), y = as_matrix(output), weight_t = transpose(weight);
      const int64_t rows = y.size(0), cols = y.size(1);
      const int64_t block_rows =
          std::max<int64_t>(kMinBlockRows, kCacheBlockBytes / (cols * int64_t(sizeof(scalar_t))));
      for (int64_t begin = 0; begin < rows; begin += block_rows) {
        const int64_t end = std::min(begin + block_rows, rows);
        matmul_out(rows_of(y, begin, end), rows_of(x, begin, end), weight_t, bias);
        if constexpr (!std::is_same_v<decltype(act), Identity>) {
          activate<decltype(act)>(y.mutable_data_ptr<scalar_t>() + begin * cols, (end - begin) * cols);
        }
      }
    });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_act_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& weight, const Tensor& output,
                                                           const std::string& activation, bool needs_grad_input,
                                                           bool needs_grad_weight, bool needs_grad_bias) {
  constexpr const char* op = "_linear_act_backward";
  check_linear_act_backward(op, grad_output, input, weight, output);
  const ScalarType dtype = input.scalar_type();
  Tensor grad_input = empty(needs_grad_input ? sizes_of(input) : std::vector<int64_t>{0}, dtype, input);
  Tensor grad_weight = empty(needs_grad_weight ? sizes_of(weight) : std::vector<int64_t>{0}, dtype, input);
  Tensor grad_bias = empty({needs_grad_bias ? weight.size(0) : 0}, dtype, input);
  dispatch_activation(op, activation, [&](auto act) {
    dispatch_floating(dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      constexpr bool is_identity = std::is_same_v<decltype(act), Identity>;
      const Tensor gy = torch::stable::contiguous(as_matrix(grad_output));
      const Tensor y = torch::stable::contiguous(as_matrix(output));
      const bool needs_grad_z = needs_grad_input || needs_grad_weight;
      // The identity's gz is gy itself: nothing to write.
      const Tensor gz = is_identity || !needs_grad_z ? gy : empty(sizes_of(gy), dtype, input);
      if (needs_grad_bias || (needs_grad_z && !is_identity)) {
        activation_backward<decltype(act), scalar_t>(
            gy.const_data_ptr<scalar_t>(), y.const_data_ptr<scalar_t>(),
            is_identity || !needs_grad_z ? nullptr : gz.mutable_data_ptr<scalar_t>(),
            needs_grad_bias ? grad_bias.mutable_data_ptr<scalar_t>() : nullptr, gy.size(0), gy.size(1));
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

}  // namespace
}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CPU, m) {
  m.impl("linear_act", TORCH_BOX(&torch_mlp::linear_act_cpu));
  m.impl("_linear_act_backward", TORCH_BOX(&torch_mlp::linear_act_backward_cpu));
}

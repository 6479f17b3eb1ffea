// linear_act on the CPU.
//
//   forward     z = x W^T + b              y = act(z)
//   backward    gz = gy * act'(z), from y  gx = gz W    gW = gz^T x    gb = sum over the batch of gz
//
// Shapes: x (batch, in_features), W (out_features, in_features), b (out_features,), y (batch, out_features); leading
// dimensions are folded into the batch.
// Fused: bias and activation follow the product on a block that is still in cache (products.cpp); gz and gb come from
// one sweep over gy and y.
// Threads: those of the products; gb is summed in blocks of rows whose number depends on the shape alone, so that its
// bits do not depend on the number of threads.
#include <algorithm>

#include "../linear_act.h"

#include "../tensor.h"
#include "dtypes.h"
#include "products.h"
#include "scratch.h"

namespace torch_mlp {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 17;

// The partial sums of gb: at most this many, of at least so many rows each.
constexpr int64_t kMaxSumBlocks = 64;
constexpr int64_t kMinSumRows = 64;

// --- the activation's backward pass: a vector kernel for float32 and bfloat16, plain loops for the other dtypes ---

// gz[i, j] = gy[i, j] * act'(z[i, j]) where gz is wanted, sums[j] += sum_i of it where the sums are (null otherwise).
template <typename Activation, typename scalar_t>
void activation_backward_rows(const scalar_t* gy, const scalar_t* y, scalar_t* gz, int64_t gz_stride, double* sums,
                              int64_t rows, int64_t cols) {
  if constexpr (has_vector_kernels<scalar_t>) {
    elementwise_kernels<scalar_t>().activation_backward(kind_of<Activation>, {bits_of(gy), cols}, {bits_of(y), cols},
                                                        {bits_of(gz), gz_stride}, sums, rows, cols);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        const auto value =
            Activation::backward(compute_t<scalar_t>(gy[i * cols + j]), compute_t<scalar_t>(y[i * cols + j]));
        if (gz) {
          gz[i * gz_stride + j] = value;
        }
        if (sums) {
          sums[j] += value;
        }
      }
    }
  }
}

// The same for whole tensors, gy and y contiguous, gb being the sums.
template <typename Activation, typename scalar_t>
void activation_backward(const Tensor& gy, const Tensor& y, const Tensor* gz, const Tensor* gb) {
  const int64_t rows = gy.size(0), cols = gy.size(1), gz_stride = gz ? gz->stride(0) : 0;
  const scalar_t *from_gy = gy.const_data_ptr<scalar_t>(), *from_y = y.const_data_ptr<scalar_t>();
  scalar_t* to_gz = gz ? gz->mutable_data_ptr<scalar_t>() : nullptr;
  const int64_t most_blocks = std::clamp<int64_t>(kMaxScratchBytes / 8 / std::max<int64_t>(1, cols), 1, kMaxSumBlocks);
  const int64_t block_rows = std::max(kMinSumRows, ceil_div(rows, most_blocks)), blocks = ceil_div(rows, block_rows);
  auto* sums = gb ? scratch<GradBiasSums, double>(blocks * cols) : nullptr;
  std::fill_n(sums, gb ? blocks * cols : 0, 0);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, block_rows * cols));
  kernels();
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * block_rows;
      activation_backward_rows<Activation>(from_gy + row * cols, from_y + row * cols,
                                           gz ? to_gz + row * gz_stride : nullptr, gz_stride,
                                           gb ? sums + block * cols : nullptr, std::min(block_rows, rows - row), cols);
    }
  });
  if (gb) {
    scalar_t* to_gb = gb->mutable_data_ptr<scalar_t>();
    for (int64_t j = 0; j < cols; ++j) {
      double total = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        total += sums[block * cols + j];
      }
      to_gb[j] = static_cast<scalar_t>(total);
    }
  }
}

// A matrix (rows, cols) of scratch memory. Its rows begin in different lines of a cache set, so that a column of it
// fits the cache too, whatever power of two cols may be.
template <typename scalar_t>
Tensor scratch_matrix(int64_t rows, int64_t cols, const Tensor& like) {
  constexpr int64_t line = 64 / sizeof(scalar_t);
  const int64_t stride = (ceil_div(cols, line) | 1) * line;
  if (rows * stride * int64_t(sizeof(scalar_t)) > kMaxScratchBytes) {
    return empty({rows, cols}, like.scalar_type(), like);
  }
  const std::array<int64_t, 2> sizes{rows, cols}, strides{stride, 1};
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(scratch<GradZ, scalar_t>(rows * stride), 2, sizes.data(),
                                                            strides.data(), 0, int32_t(like.scalar_type()),
                                                            aoti_torch_device_type_cpu(), 0, &view));
  return Tensor(view);
}

}  // namespace

// --- the ops ---

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
    linear_act_out_cpu<decltype(act)>(as_matrix(output), as_matrix(input), weight, bias);
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
  // An error that names the op its reader has called.
  dispatch_differentiable("linear_act", activation, [&](auto act) {
    dispatch_floating(dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      const Tensor x = as_matrix(input);
      const Tensor gy = as_contiguous(as_matrix(grad_output));
      const Tensor y = as_contiguous(as_matrix(output));
      // The identity's gz is gy itself: nothing to write.
      const bool writes_grad_z = (needs_grad_input || needs_grad_weight) && !std::is_same_v<decltype(act), Identity>;
      const Tensor gz = writes_grad_z ? scratch_matrix<scalar_t>(gy.size(0), gy.size(1), input) : gy;
      if (needs_grad_bias || writes_grad_z) {
        activation_backward<decltype(act), scalar_t>(gy, y, writes_grad_z ? &gz : nullptr,
                                                     needs_grad_bias ? &grad_bias : nullptr);
      }
      if (needs_grad_input) {
        linear_grad_input_out_cpu(as_matrix(grad_input), gz, weight, false);
      }
      if (needs_grad_weight) {
        linear_grad_weight_out_cpu(grad_weight, gz, x, false);
      }
    });
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CPU, m) {
  m.impl("linear_act", TORCH_BOX(&torch_mlp::linear_act_cpu));
  m.impl("_linear_act_backward", TORCH_BOX(&torch_mlp::linear_act_backward_cpu));
}

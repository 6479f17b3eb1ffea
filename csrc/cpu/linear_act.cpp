// linear_act on the CPU.
//
//   forward     z = x W^T + b              y = act(z)
//   backward    gz = gy * act'(z), from y  gx = gz W    gW = gz^T x    gb = sum over the batch of gz
//
// Shapes: x (batch, in_features), W (out_features, in_features), b (out_features,), y (batch, out_features); leading
// dimensions are folded into the batch.
// Fused: bias and activation follow the product on a block that is still in cache; gz and gb come from one sweep over
// gy and y.
// Whose product: for float32 mostly the vector kernels' (gemm.h), else the library's; kernels_win says where.
// Threads: by parts of the result, so that every element is summed in the same order whichever thread does it; gb is
// summed in blocks of rows whose number depends on the shape alone. So the bits do not depend on the number of threads,
// but for what the library computes.
#include <algorithm>

#include "../linear_act.h"

#include "../tensor.h"
#include "dtypes.h"
#include "scratch.h"

namespace torch_mlp {
namespace {

// Below this many elements, or multiplications, a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 18;
constexpr int64_t kMultiplicationsPerThread = 1 << 23;

// A block of the output that stays in the second-level cache between the library's product and the activation.
constexpr int64_t kCacheBlockBytes = 1 << 20;
constexpr int64_t kMinBlockRows = 256;  // fewer rows make the library pack the weight too often

// The partial sums of gb: at most this many, of at least so many rows each.
constexpr int64_t kMaxSumBlocks = 64;
constexpr int64_t kMinSumRows = 64;

// --- elementwise work: the vector kernels for float32 and bfloat16, plain loops for the other dtypes ---

template <typename Activation, typename scalar_t>
void activate(scalar_t* y, int64_t count) {
  kernels();  // the first call may throw, which must not happen inside a parallel region
  torch::stable::parallel_for(0, count, kElementsPerThread, [&](int64_t begin, int64_t end) {
    if constexpr (has_vector_kernels<scalar_t>) {
      elementwise_kernels<scalar_t>().activate(kind_of<Activation>, bits_of(y + begin), end - begin);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        y[i] = Activation::forward(compute_t<scalar_t>(y[i]));
      }
    }
  });
}

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

// --- products ---
struct KernelsWin {
  bool forward, grad_input, grad_weight;
};

// Which of the three products the vector kernels compute faster than the library: kernels over library, one thread,
// AVX-512, each product alone and both in turns.
//                                             forward      grad_input    grad_weight
//   AMD Zen 4                batch 1          1.1 to 1.7   0.9 to 1.5    1.4 to 1.8
//                            batch 8          1.6 to 2.3   1.6 to 2.2    1.2 to 1.8
//                            batch 32 to 512  1.1 to 1.4   1.1 to 1.4    1.1 to 1.2
//                            batch 4096       1.1 to 1.4   1.1 to 1.2    1.0 to 1.1
//                            10 outputs       1.5 to 2.4   0.9 to 1.1    1.1 to 2.0
//   Intel Sapphire Rapids    batch 8 to 128   1.1 to 1.5   0.8 to 1.0    0.8 to 0.95
//                            batch 512        0.9 to 1.0   0.9 to 1.0    0.8 to 1.0
//                            10 outputs       1.5 to 2.2   0.8 to 0.95   1.2 to 1.4
// MKL runs at 85 to 90 % of the peak on Intel's processors, and at 65 to 85 % elsewhere.
KernelsWin kernels_win(const LinearShape& shape) {
  constexpr int64_t most_depth = 4096;  // bounds the panel, 64 rows of that many
  const Products faster = faster_products();
  if (faster == Products::Library) {
    return {false, false, false};
  }
  if (faster == Products::Kernels) {
    return {shape.in_features <= most_depth, shape.out_features <= most_depth, true};
  }
  const bool has_few_outputs = shape.out_features <= 16;
  return {has_few_outputs || shape.batch <= 128, false, has_few_outputs && shape.batch <= 1024};
}

LinearShape linear_shape(const Tensor& x, const Tensor& weight) { return {x.size(0), weight.size(1), weight.size(0)}; }

// The matrix itself where the elements of a row are adjacent, else a copy.
Tensor with_adjacent_columns(const Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix : as_contiguous(matrix);
}

ConstMatrix const_matrix(const Tensor& matrix) { return {matrix.const_data_ptr<float>(), matrix.stride(0)}; }

Matrix matrix(const Tensor& self, int64_t cols) { return {self.mutable_data_ptr<float>(), cols}; }

// How many of these tasks a thread should at least have.
int64_t grain_of(int64_t tasks, int64_t multiplications) {
  return std::max<int64_t>(1, kMultiplicationsPerThread * tasks / std::max<int64_t>(1, multiplications));
}

void forward_by_kernels(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        ActivationKind activation, const Tensor& output) {
  const LinearShape shape = linear_shape(input, weight);
  const Tensor x = with_adjacent_columns(input), w = with_adjacent_columns(weight);
  const std::optional<Tensor> b = bias ? std::optional(as_contiguous(*bias)) : std::nullopt;
  const LinearForward<float> forward{shape,
                                     const_matrix(x),
                                     const_matrix(w),
                                     b ? b->const_data_ptr<float>() : nullptr,
                                     matrix(output, shape.out_features),
                                     activation};
  const ProductKernels<float>& table = kernels().products_float;
  const int64_t tasks = table.linear_tasks(shape);
  const int64_t grain = grain_of(tasks, shape.batch * shape.in_features * shape.out_features);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    table.linear(forward, begin, end, scratch<Panel, float>(table.linear_scratch(shape)));
  });
}

void product_by_kernels(const Product<float>& product) {
  const ProductKernels<float>& table = kernels().products_float;
  const int64_t tasks = table.product_tasks(product);
  const int64_t grain = grain_of(tasks, product.rows * product.cols * product.depth);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    table.product(product, begin, end, scratch<Panel, float>(table.product_scratch(product)));
  });
}

template <typename Activation, typename scalar_t>
void forward_by_library(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y) {
  const Tensor weight_t = transpose(weight);
  const int64_t rows = y.size(0), cols = y.size(1);
  const int64_t block_rows = std::max<int64_t>(kMinBlockRows, kCacheBlockBytes / (cols * int64_t(sizeof(scalar_t))));
  for (int64_t begin = 0; begin < rows; begin += block_rows) {
    const int64_t end = std::min(begin + block_rows, rows);
    matmul_out(rows_of(y, begin, end), rows_of(x, begin, end), weight_t, bias);
    if constexpr (!std::is_same_v<Activation, Identity>) {
      activate<Activation>(y.mutable_data_ptr<scalar_t>() + begin * cols, (end - begin) * cols);
    }
  }
}

bool may_use_kernels(const Tensor& of_output, const LinearShape& shape) {
  return of_output.scalar_type() == ScalarType::Float && of_output.numel() > 0 && shape.in_features > 0;
}

template <typename Activation>
void linear_act_out(const Tensor& output, const Tensor& input, const Tensor& weight,
                    const std::optional<Tensor>& bias) {
  const LinearShape shape = linear_shape(input, weight);
  if (may_use_kernels(output, shape) && kernels_win(shape).forward) {
    forward_by_kernels(input, weight, bias, kind_of<Activation>, output);
  } else {
    dispatch_floating(output.scalar_type(),
                      [&](auto zero) { forward_by_library<Activation, decltype(zero)>(input, weight, bias, output); });
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

// --- the products of a linear layer, into matrices that are there ---

void linear_out_cpu(const Tensor& output, const Tensor& input, const Tensor& weight,
                    const std::optional<Tensor>& bias) {
  linear_act_out<Identity>(output, input, weight, bias);
}

void linear_grad_input_out_cpu(const Tensor& grad_input, const Tensor& grad_z, const Tensor& weight, bool accumulates) {
  const LinearShape shape = linear_shape(grad_input, weight);
  if (may_use_kernels(grad_z, shape) && kernels_win(shape).grad_input) {
    const Tensor w = with_adjacent_columns(weight);
    product_by_kernels({shape.batch, shape.in_features, shape.out_features, const_matrix(grad_z), false,
                        const_matrix(w), matrix(grad_input, shape.in_features), accumulates});
  } else {
    matmul_out(grad_input, grad_z, weight, accumulates ? std::optional(grad_input) : std::nullopt);
  }
}

void linear_grad_weight_out_cpu(const Tensor& grad_weight, const Tensor& grad_z, const Tensor& input,
                                bool accumulates) {
  const LinearShape shape = linear_shape(input, grad_weight);
  if (may_use_kernels(grad_z, shape) && kernels_win(shape).grad_weight) {
    const Tensor x = with_adjacent_columns(input);
    product_by_kernels({shape.out_features, shape.in_features, shape.batch, const_matrix(grad_z), true, const_matrix(x),
                        matrix(grad_weight, shape.in_features), accumulates});
  } else {
    matmul_out(grad_weight, transpose(grad_z), input, accumulates ? std::optional(grad_weight) : std::nullopt);
  }
}

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
    linear_act_out<decltype(act)>(as_matrix(output), as_matrix(input), weight, bias);
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

// The three products of a linear layer on the CPU: by the vector kernels (gemm.h), by a matrix unit (gemm_amx.h) or by
// torch's library.
//
// Fused: bias and activation follow the kernels' product on a block that is still in cache.
// Whose product: matrix_unit_wins and bfloat16_unit_wins say where a matrix unit multiplies, kernels_win and
// bfloat16_kernels_win where the vector kernels have the rest: for float32 mostly, for bfloat16 (gemm_bfloat16.h) in
// small batches.
// Threads: by parts of the result, so that every element is summed in the same order whichever thread does it. So the
// bits do not depend on the number of threads, but for what the library computes, or a matrix unit in float32.
#include "products.h"

#include <algorithm>

#include "dtypes.h"
#include "scratch.h"

namespace torch_mlp {
namespace {

using torch::headeronly::BFloat16;

// Below this many elements, or multiplications, a second thread costs more than it saves: 25 us of work, measured on
// two cores of Intel Emerald Rapids with threads that sleep while they wait.
constexpr int64_t kElementsPerThread = 1 << 16;
constexpr int64_t kMultiplicationsPerThread = 1 << 21;
constexpr int64_t kUnitSpeed = 4;  // how much faster than the vector kernels a matrix unit multiplies pairs of bfloat16

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
//   Intel Emerald Rapids     batch 1          1.1 to 2.3   1.0 to 1.1    1.0 to 1.1
//                            batch 8          1.4 to 2.4   0.9 to 1.0    0.9 to 1.2
//                            batch 32, 64     1.2 to 1.8   0.9 to 1.2    0.8 to 1.05
//                            batch 128 to 512 1.0 to 1.2   0.95 to 1.1   0.9 to 1.05
//                            batch 1024       0.95 to 1.05 0.95 to 1.0   0.9 to 1.0
//                            batch 4096       0.95 to 1.05 0.9 to 0.95   0.85 to 1.0
//                            10 outputs       1.8 to 3.7   0.9 to 1.7    1.2 to 1.9
//     two threads            batch 256        0.95 to 1.2
//                            batch 512 up     0.85 to 1.05, with up to 256 outputs 0.95 to 1.15
// and AVX2:
//   AMD Zen 3                batch 1          1.3 to 1.4   1.1 to 1.5    1.0 to 2.3
//                            batch 8          1.2 to 1.8   0.95 to 1.2   0.8 to 1.4
//                            batch 32 to 512  0.95 to 1.4  0.95 to 1.2   0.85 to 1.1
//                            batch 4096       0.9 to 1.3   0.75 to 1.5   0.8 to 1.2
//                            10 outputs       1.1 to 2.5   0.85 to 1.2   1.0 to 1.2
// MKL runs at 85 to 90 % of the peak on Intel's processors, at 65 to 85 % on AMD Zen 3 and 4, at half on Zen 5.
KernelsWin kernels_win(const LinearShape& shape) {
  constexpr int64_t most_depth = 4096;  // bounds the panel, 64 rows of that many
  const Products faster = faster_products();
  if (faster == Products::Library) {
    return {false, false, false};
  }
  if (faster == Products::Kernels) {
    return {shape.in_features <= most_depth, shape.out_features <= most_depth, true};
  }
  return {shape.in_features <= most_depth && (shape.batch <= 256 || shape.out_features <= 256),
          shape.out_features <= most_depth && shape.batch <= 512, shape.batch <= 64 || shape.out_features <= 16};
}

// The same in bfloat16, identity for activation, where the processor multiplies pairs and no matrix unit wins (see
// below); elsewhere the library has all three. On AMD's processors its products run at 85 to 90 % of the peak once they
// are large, and it writes a large gradient of the weight faster.
//                                             forward      grad_input    grad_weight
//   AMD Zen 5                batch 1, 8       0.5 to 1.5   1.2 to 2.2    0.9 to 1.5
//                            batch 32         1.2 to 1.8   1.1 to 1.3    0.9 to 1.2
//                            batch 64         1.1 to 1.5   1.0 to 1.2    0.9 to 1.2
//                            batch 128        1.1 to 1.2   1.0 to 1.05   0.95 to 1.05
//                            batch 256, 512   0.95 to 1.2  0.8 to 1.0    0.9 to 1.05
//                            batch 1024       1.0 to 1.1   0.8 to 1.0    0.9 to 1.0
//                            batch 4096       0.9 to 1.05  0.7 to 0.9    0.9
//                            10 outputs       0.8 to 4.9   0.7 to 2.5    1.2 to 2.5
// Of a few rows the forward pass wins with up to 256 outputs; grad_weight, from 512 rows down, where it has up to
// 512 x 512 elements. 10 outputs of 4096 rows lose forward, and of 1024 in grad_input.
// On Intel's with AMX its products take 20 us or more, and then run eight times as fast:
//   Intel Emerald Rapids     to 2^19 multiplications
//                              10 outputs     1.4 to 12    1.6 to 15     1.8 to 15
//                              others         0.5 to 0.9   2.6 to 4.2    1.9 to 3.4
//                            2^20             0.4 to 0.9   1.1 to 1.8    1.1 to 1.6
//                            more             0.1 to 0.9   0.1 to 0.9    0.1 to 0.9
KernelsWin bfloat16_kernels_win(const LinearShape& shape) {
  constexpr int64_t most_depth = 8192;  // bounds the panel, 64 rows of that many
  if (!kernels().into_bfloat16.linear || faster_products() == Products::Library) {
    return {false, false, false};
  }
  const bool has_few_outputs = shape.out_features <= 16;
  const bool has_pairs = shape.in_features % 2 == 0 && shape.in_features <= most_depth;
  if (faster_products() == Products::KernelsIfSmall) {
    const int64_t multiplications = shape.batch * shape.in_features * shape.out_features;
    const bool is_small = multiplications <= 1 << 20;
    return {has_pairs && has_few_outputs && multiplications <= 1 << 19, is_small, is_small};
  }
  return {has_pairs && shape.batch <= 1024 && (shape.batch >= 16 || shape.out_features <= 256),
          shape.batch <= (has_few_outputs ? 512 : 128),
          has_few_outputs || (shape.batch <= 512 && shape.in_features * shape.out_features <= 1 << 18)};
}

// Whether the matrix unit of the processor, if it has one, has a float32 product (rows, depth) times (depth, cols). The
// unit over MKL, one thread, Intel Emerald Rapids:
//                            forward      grad_input    grad_weight
//   batch 64                 1.2 to 1.6   1.0 to 1.3    1.2 to 1.6
//   batch 128                1.3 to 1.7   1.3 to 1.6    1.3 to 1.6
//   batch 512                1.5 to 1.6   1.5 to 1.7    1.5 to 1.6
//   batch 4096               1.6 to 1.8   1.6           1.1 to 1.5
// To split an element of an operand, or to finish one of the result, costs as much as about 32 multiplications. What
// fills up the unit's tiles, two of 16 beside each other, costs as much as what counts.
//
// With one thread only, unless the level is forced: on the virtual machine where this was measured the unit often fell
// to 0.4 times its speed, for seconds, when two processors used it or had slept, and two threads then took up to 1.8
// times as long as MKL's; when it did not fall they were 1.2 to 1.5 times as fast.
bool matrix_unit_wins(int64_t rows, int64_t cols, int64_t depth) {
  constexpr int64_t band = 32;
  const bool is_forced = faster_products() == Products::Kernels;  // else a processor with this unit, Intel's, has MKL
  if (!kernels().unit_float.product || !(is_forced || torch::stable::get_num_threads() == 1)) {
    return false;
  }
  const auto padded = [](int64_t size) { return ceil_div(size, band) * band; };
  const int64_t multiplications = rows * cols * depth, visited = rows * cols + (rows + cols) * depth;
  return 32 * visited <= multiplications && 3 * padded(rows) * padded(cols) * padded(depth) <= 4 * multiplications;
}

// The same of bfloat16, which the library multiplies by the unit too, and with any number of threads: the forward pass
// always, gradients where tiles are filled by half, or by a quarter where there is little to do. But a grad_input for
// which writing it is most of the work is left to the library. The unit's kernels over the better one of vector kernels
// and library, one thread:
//                            forward      grad_input    grad_weight
//   batch 1                  1.8 to 3.3   0.4 to 0.6    0.4 to 0.5
//   batch 8                  1.3 to 4.4   1.0 to 1.8    0.8 to 1.8
//   batch 16, 32             1.2 to 4.6   1.1 to 2.8    0.9 to 2.6
//   batch 64                 1.8 to 3.6   1.5 to 3.6    0.9 to 2.9
//   batch 256                1.2 to 1.7   0.8 to 2.2    1.1 to 2.0
//   batch 512                1.0 to 5.0   0.8 to 3.4    1.0 to 2.6
//   batch 4096               0.9 to 2.1   0.6 to 1.6    0.9 to 1.6
//     up to 256 outputs                   0.6 to 1.0
//   10 outputs, to 512 rows  1.1 to 2.2   0.9 to 1.5    0.8 to 1.1
//     1024 and 4096 rows     1.2 to 2.0   0.8 to 1.3    0.5 to 0.7
bool bfloat16_unit_wins(int64_t rows, int64_t cols, int64_t depth, bool a_transposed) {
  constexpr int64_t band = 32, few_multiplications = 1 << 21, large = 1 << 18, short_depth = 256;
  const int64_t least = std::min({rows, cols, depth});
  const bool is_filled = least >= band / 2 || (least >= band / 4 && rows * cols * depth <= few_multiplications);
  const bool is_mostly_written = !a_transposed && rows * cols > large && depth <= short_depth;
  return kernels().unit_bfloat16.product && is_filled && !is_mostly_written;
}

LinearShape linear_shape(const Tensor& x, const Tensor& weight) { return {x.size(0), weight.size(1), weight.size(0)}; }

// The matrix itself where the elements of a row are adjacent, else a copy.
Tensor with_adjacent_columns(const Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix : as_contiguous(matrix);
}

template <typename T>
Rows<T> rows_from(T* data, int64_t stride) {
  return {data, stride};
}

// A matrix as the kernels take it.
template <typename scalar_t>
auto const_rows(const Tensor& matrix) {
  return rows_from(bits_of(matrix.const_data_ptr<scalar_t>()), matrix.stride(0));
}

template <typename scalar_t>
auto rows(const Tensor& self, int64_t cols) {
  return rows_from(bits_of(self.mutable_data_ptr<scalar_t>()), cols);
}

// A matrix of an even number of columns, whose rows can be read in pairs: itself, or else a copy.
Tensor with_pairs(const Tensor& matrix) {
  const auto address = reinterpret_cast<uintptr_t>(matrix.const_data_ptr());
  if (matrix.stride(1) == 1 && (matrix.stride(0) % 2 == 0 || matrix.size(0) == 1) &&
      address % alignof(bfloat16_pair) == 0) {
    return matrix;
  }
  Tensor copy = empty(sizes_of(matrix), matrix.scalar_type(), matrix);
  torch::stable::copy_(copy, matrix);
  return copy;
}

Rows<const bfloat16_pair> pairs_of(const Tensor& matrix) {
  return {reinterpret_cast<const bfloat16_pair*>(matrix.const_data_ptr<BFloat16>()), matrix.stride(0) / 2};
}

// How many of these tasks a thread should at least have, of a product of matrices (rows, depth) and (depth, cols), of
// floats or pairs. To visit an element takes as long as eight multiplications.
int64_t grain_of(int64_t tasks, int64_t rows, int64_t cols, int64_t depth, int64_t speed) {
  const int64_t visited = std::max({rows * cols, rows * depth, depth * cols});
  const int64_t multiplications = std::max({rows * cols * depth / speed, 8 * visited, int64_t(1)});
  return std::max<int64_t>(1, kMultiplicationsPerThread * tasks / multiplications);
}

template <typename T>
int64_t in_floats_or_pairs(int64_t depth) {
  return std::is_same_v<T, float> ? depth : depth / 2;
}

// A bias of any stride, in float; valid until the next one of bfloat16.
class FloatBias {
 public:
  explicit FloatBias(const std::optional<Tensor>& bias) {
    if (!bias) {
      return;
    }
    contiguous_ = as_contiguous(*bias);
    if (bias->scalar_type() == ScalarType::Float) {
      data_ = contiguous_->const_data_ptr<float>();
    } else {
      float* const copy = scratch<BiasInFloat, float>(bias->size(0));
      std::copy_n(contiguous_->const_data_ptr<BFloat16>(), bias->size(0), copy);
      data_ = copy;
    }
  }
  const float* data() const { return data_; }

 private:
  std::optional<Tensor> contiguous_;
  const float* data_ = nullptr;
};

// y = act(x W^T + b) by kernels for operands as they lie in memory.
template <typename scalar_t, typename T>
void forward_by(const ProductKernels<T, T>& table, int64_t speed, const Tensor& input, const Tensor& weight,
                const std::optional<Tensor>& bias, ActivationKind activation, const Tensor& output) {
  const LinearShape shape = linear_shape(input, weight);
  const Tensor x = with_adjacent_columns(input), w = with_adjacent_columns(weight);
  const FloatBias b(bias);
  const LinearForward<T, T> forward{
      shape,     const_rows<scalar_t>(x), const_rows<scalar_t>(w), b.data(), rows<scalar_t>(output, shape.out_features),
      activation};
  const int64_t tasks = table.linear_tasks(shape);
  const int64_t depth = in_floats_or_pairs<T>(shape.in_features);
  const int64_t grain = grain_of(tasks, shape.batch, shape.out_features, depth, speed);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    table.linear(forward, begin, end, scratch<Panel, T>(table.linear_scratch(shape)));
  });
}

// The same of bfloat16 by the vector kernels. x and weight are read in pairs of columns, of which there is an even
// number.
void forward_by_pairs(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      ActivationKind activation, const Tensor& output) {
  const LinearShape shape = linear_shape(input, weight),
                    in_pairs{shape.batch, shape.in_features / 2, shape.out_features};
  const Tensor x = with_pairs(input), w = with_pairs(weight);
  const FloatBias b(bias);
  const LinearForward<bfloat16_pair, bfloat16_bits> forward{
      in_pairs, pairs_of(x), pairs_of(w), b.data(), rows<BFloat16>(output, shape.out_features), activation};
  const ProductKernels<bfloat16_pair>& table = kernels().products_bfloat16;
  const auto linear = kernels().into_bfloat16.linear;
  const int64_t tasks = table.linear_tasks(in_pairs);
  const int64_t grain = grain_of(tasks, shape.batch, shape.out_features, in_pairs.in_features, 1);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    linear(forward, begin, end, scratch<Panel, bfloat16_pair>(table.linear_scratch(in_pairs)));
  });
}

void forward_by_kernels(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        ActivationKind activation, const Tensor& output) {
  const auto [batch, ins, outs] = linear_shape(input, weight);
  if (output.scalar_type() == ScalarType::Float) {
    const bool by_unit = matrix_unit_wins(batch, outs, ins);
    forward_by<float>(by_unit ? kernels().unit_float : kernels().products_float, 1, input, weight, bias, activation,
                      output);
  } else if (kernels().unit_bfloat16.linear) {
    forward_by<BFloat16>(kernels().unit_bfloat16, kUnitSpeed, input, weight, bias, activation, output);
  } else {
    forward_by_pairs(input, weight, bias, activation, output);
  }
}

template <typename T, typename Table>
void product_by(const Table& table, int64_t speed, const Product<T, T>& product) {
  const int64_t tasks = table.product_tasks(product);
  const int64_t grain = grain_of(tasks, product.rows, product.cols, in_floats_or_pairs<T>(product.depth), speed);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    table.product(product, begin, end, scratch<Panel, T>(table.product_scratch(product)));
  });
}

void product_by_kernels(const Product<float>& product) {
  const bool by_unit = matrix_unit_wins(product.rows, product.cols, product.depth);
  product_by(by_unit ? kernels().unit_float : kernels().products_float, 1, product);
}

void product_by_kernels(const Bfloat16Product& product) {
  if (bfloat16_unit_wins(product.rows, product.cols, product.depth, product.a_transposed)) {
    product_by(kernels().unit_bfloat16, kUnitSpeed, product);
  } else {
    product_by(kernels().into_bfloat16, 1, product);
  }
}

// In one product, for a library that packs the weight would do so for each part of it. y is seen as rows, so that its
// version, which counts what torch writes in place, stays that of a new tensor.
template <typename Activation, typename scalar_t>
void forward_by_library(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y) {
  matmul_out(rows_of(y, 0, y.size(0)), x, transpose(weight), bias);
  if constexpr (!std::is_same_v<Activation, Identity>) {
    activate<Activation>(y.mutable_data_ptr<scalar_t>(), y.numel());
  }
}

// Who computes the products of a layer with that output.
KernelsWin kernels_win(const Tensor& of_output, const LinearShape& shape) {
  const auto& [batch, ins, outs] = shape;
  if (of_output.numel() > 0 && ins > 0) {
    if (of_output.scalar_type() == ScalarType::Float) {
      const KernelsWin win = kernels_win(shape);
      return {win.forward || matrix_unit_wins(batch, outs, ins), win.grad_input || matrix_unit_wins(batch, ins, outs),
              win.grad_weight || matrix_unit_wins(outs, ins, batch)};
    }
    if (of_output.scalar_type() == ScalarType::BFloat16) {
      const KernelsWin win = bfloat16_kernels_win(shape);
      return {win.forward || kernels().unit_bfloat16.linear,
              win.grad_input || bfloat16_unit_wins(batch, ins, outs, false),
              win.grad_weight || bfloat16_unit_wins(outs, ins, batch, true)};
    }
  }
  return {false, false, false};
}

}  // namespace

template <typename Activation>
void linear_act_out_cpu(const Tensor& output, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias) {
  const LinearShape shape = linear_shape(input, weight);
  if (kernels_win(output, shape).forward) {
    forward_by_kernels(input, weight, bias, kind_of<Activation>, output);
  } else {
    dispatch_floating(output.scalar_type(),
                      [&](auto zero) { forward_by_library<Activation, decltype(zero)>(input, weight, bias, output); });
  }
}

template void linear_act_out_cpu<Identity>(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&);
template void linear_act_out_cpu<Sigmoid>(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&);
template void linear_act_out_cpu<Tanh>(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&);
template void linear_act_out_cpu<ReLU>(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&);
template void linear_act_out_cpu<Step>(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&);

void linear_grad_input_out_cpu(const Tensor& grad_input, const Tensor& grad_z, const Tensor& weight, bool accumulates) {
  const LinearShape shape = linear_shape(grad_input, weight);
  const bool by_kernels = kernels_win(grad_z, shape).grad_input, in_float = grad_z.scalar_type() == ScalarType::Float;
  if (by_kernels && in_float) {
    const Tensor w = with_adjacent_columns(weight);
    product_by_kernels(Product<float>{shape.batch, shape.in_features, shape.out_features, const_rows<float>(grad_z),
                                      false, const_rows<float>(w), rows<float>(grad_input, shape.in_features),
                                      accumulates});
  } else if (by_kernels && !accumulates) {  // in 16 bits nobody adds, for the sums would be rounded
    const Tensor w = with_adjacent_columns(weight);
    product_by_kernels(Bfloat16Product{shape.batch, shape.in_features, shape.out_features, const_rows<BFloat16>(grad_z),
                                       false, const_rows<BFloat16>(w), rows<BFloat16>(grad_input, shape.in_features)});
  } else {
    matmul_out(grad_input, grad_z, weight, accumulates ? std::optional(grad_input) : std::nullopt);
  }
}

void linear_grad_weight_out_cpu(const Tensor& grad_weight, const Tensor& grad_z, const Tensor& input,
                                bool accumulates) {
  const LinearShape shape = linear_shape(input, grad_weight);
  const bool by_kernels = kernels_win(grad_z, shape).grad_weight, in_float = grad_z.scalar_type() == ScalarType::Float;
  if (by_kernels && in_float) {
    const Tensor x = with_adjacent_columns(input);
    product_by_kernels(Product<float>{shape.out_features, shape.in_features, shape.batch, const_rows<float>(grad_z),
                                      true, const_rows<float>(x), rows<float>(grad_weight, shape.in_features),
                                      accumulates});
  } else if (by_kernels && !accumulates) {
    const Tensor x = with_adjacent_columns(input);
    product_by_kernels(Bfloat16Product{shape.out_features, shape.in_features, shape.batch, const_rows<BFloat16>(grad_z),
                                       true, const_rows<BFloat16>(x), rows<BFloat16>(grad_weight, shape.in_features)});
  } else {
    matmul_out(grad_weight, transpose(grad_z), input, accumulates ? std::optional(grad_weight) : std::nullopt);
  }
}

}  // namespace torch_mlp

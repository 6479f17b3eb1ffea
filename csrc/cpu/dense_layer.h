// A linear layer in training on the CPU: its output, the gradient of its input, its step of SGD, each for the columns
// that a thread owns.
//
//   y  = act(x W^T + b)        gx = gz W        W moves by a step of SGD with gW = gz^T x
//
// The products are of floats, or of the bfloat16 nearest to them, two in an element (kernels.h), and then summed in
// float all the same. W itself is always kept and moved in float.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../tensor.h"
#include "kernels.h"
#include "scratch.h"

namespace torch_mlp {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Some numbers with what moves them, and velocity null where there is no momentum.
struct Parameter {
  float* value;
  float* velocity;

  Parameter from(int64_t offset) const { return {value + offset, velocity ? velocity + offset : nullptr}; }
};

struct Layer {
  int64_t ins, outs;
  ActivationKind activation;
  Parameter weight, bias;  // bias.value is null where there is none
};

inline void move(const Parameter& parameter, const float* gradient, int64_t count, const SgdStep& step) {
  kernels().sgd(parameter.value, parameter.velocity, gradient, count, step);
}

template <typename T>
Rows<T> from_column(Rows<T> matrix, int64_t col) {
  return {matrix.data + col, matrix.stride};
}

template <typename T>
Rows<T> take_matrix(int64_t rows, int64_t cols, Arena& arena) {
  // An odd number of cache lines, so that a column of the matrix does not fall into a few sets of a cache.
  const int64_t stride = (ceil_div(cols, 16) | 1) * 16;
  return {arena.take<T>(rows * stride), stride};
}

// A matrix as the products take it: its values, and in bfloat16 the pairs of its columns and of its rows, as far as
// they are needed.
struct Operand {
  Matrix values{};
  Rows<bfloat16_pair> columns{}, rows{};

  void take_pairs(int64_t row_count, int64_t col_count, bool needs_columns, bool needs_rows, Arena& arena) {
    if (needs_columns) {
      columns = take_matrix<bfloat16_pair>(row_count, ceil_div(col_count, 2), arena);
    }
    if (needs_rows) {
      rows = take_matrix<bfloat16_pair>(ceil_div(row_count, 2), col_count, arena);
    }
  }

  // Makes the pairs of some values; both ranges begin at an even number.
  void pair(Range of_rows, Range of_cols) const {
    const Matrix from{values.data + of_rows.begin * values.stride + of_cols.begin, values.stride};
    if (columns.data) {
      kernels().pair_columns(from, of_rows.size(), of_cols.size(),
                             {columns.data + of_rows.begin * columns.stride + of_cols.begin / 2, columns.stride});
    }
    if (rows.data) {
      kernels().pair_rows(from, of_rows.size(), of_cols.size(),
                          {rows.data + of_rows.begin / 2 * rows.stride + of_cols.begin, rows.stride});
    }
  }
};

// Memory of a thread's own: for products, and for the gradient of kUpdateRows rows of a weight.
struct Workspace {
  float *products, *gradient;
};

constexpr int64_t kUpdateRows = 64;  // of a weight, whose gradients are computed at once

template <typename T>
void multiply(const Product<T>& product, const Workspace& my) {
  const ProductKernels<T>& table = product_kernels<T>();
  table.product(product, 0, table.product_tasks(product), reinterpret_cast<T*>(my.products));
}

class DenseLayer {
 public:
  // passes_on: whether the gradient of its input will be asked for
  DenseLayer(const Layer& layer, bool in_bfloat16, bool passes_on, Arena& arena)
      : layer_(layer), in_bfloat16_(in_bfloat16) {
    weight_.values = {layer.weight.value, layer.ins};
    weight_.take_pairs(layer.outs, layer.ins, in_bfloat16, in_bfloat16 && passes_on, arena);
  }

  bool in_bfloat16() const { return in_bfloat16_; }

  // Of the weight's values, which have moved.
  void pair_weight(Range rows, Range cols) const { weight_.pair(rows, cols); }

  // Elements of Workspace::products for any of what follows.
  int64_t scratch(int64_t batch) const {
    const int64_t ins = layer_.ins, outs = layer_.outs;
    const ProductKernels<float>& table = kernels().products_float;
    return std::max({product_kernels<bfloat16_pair>().linear_scratch({batch, ins, outs}),
                     table.linear_scratch({batch, ins, outs}),
                     table.product_scratch({batch, ins, outs, {}, false, {}, {}}),
                     table.product_scratch({outs, ins, batch, {}, true, {}, {}})});
  }

  // The columns of the output, which begin at output.
  void forward(const Operand& input, int64_t batch, Range cols, Matrix output, const Workspace& my) const {
    const float* bias = layer_.bias.value ? layer_.bias.value + cols.begin : nullptr;
    in_bfloat16_
        ? linear(input.columns, weight_.columns, {0, ceil_div(layer_.ins, 2)}, batch, cols, bias, layer_.activation,
                 output, my)
        : linear(input.values, weight_.values, {0, layer_.ins}, batch, cols, bias, layer_.activation, output, my);
  }

  // What some columns of the input, from an even one on, add to z: contiguous, (batch, outs).
  void forward_part(const Operand& input, int64_t batch, Range ins, bool adds_bias, float* z,
                    const Workspace& my) const {
    const Range outs{0, layer_.outs};
    const float* bias = adds_bias ? layer_.bias.value : nullptr;
    constexpr auto none = ActivationKind::Identity;
    in_bfloat16_ ? linear(input.columns, weight_.columns, {ins.begin / 2, ceil_div(ins.end, 2)}, batch, outs, bias,
                          none, {z, layer_.outs}, my)
                 : linear(input.values, weight_.values, ins, batch, outs, bias, none, {z, layer_.outs}, my);
  }

  // The columns of the gradient of the input, which begin at grad_input.
  void backward(const Operand& grad_z, int64_t batch, Range cols, Matrix grad_input, const Workspace& my) const {
    if (in_bfloat16_) {
      multiply<bfloat16_pair>({batch, cols.size(), ceil_div(layer_.outs, 2), grad_z.columns, false,
                               from_column(weight_.rows, cols.begin), grad_input},
                              my);
    } else {
      multiply<float>(
          {batch, cols.size(), layer_.outs, grad_z.values, false, from_column(weight_.values, cols.begin), grad_input},
          my);
    }
  }

  // A step of SGD of some rows and columns of the weight; adds_directly: its gradient is what is to be added.
  void move_weight(Range rows, Range cols, const Operand& grad_z, const Operand& input, int64_t batch,
                   const SgdStep& step, bool adds_directly, const Workspace& my) const {
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t count = adds_directly ? rows.size() : std::min(kUpdateRows, rows.end - row);
      const Parameter part = layer_.weight.from(row * layer_.ins + cols.begin);
      const Matrix gradient = adds_directly ? Matrix{part.value, layer_.ins} : Matrix{my.gradient, cols.size()};
      in_bfloat16_ ? multiply_gradient(grad_z.rows, input.rows, ceil_div(batch, 2), {row, row + count}, cols, gradient,
                                       adds_directly, my)
                   : multiply_gradient(grad_z.values, input.values, batch, {row, row + count}, cols, gradient,
                                       adds_directly, my);
      for (int64_t r = 0; r < count && !adds_directly; ++r) {
        move(part.from(r * layer_.ins), gradient.data + r * gradient.stride, cols.size(), step);
      }
      row += count;
    }
    pair_weight(rows, cols);
  }

 private:
  template <typename T>
  static void linear(Rows<T> input, Rows<T> weight, Range ins, int64_t batch, Range outs, const float* bias,
                     ActivationKind activation, Matrix output, const Workspace& my) {
    const ProductKernels<T>& table = product_kernels<T>();
    const LinearShape shape{batch, ins.size(), outs.size()};
    table.linear({shape,
                  from_column(input, ins.begin),
                  {weight.data + outs.begin * weight.stride + ins.begin, weight.stride},
                  bias,
                  output,
                  activation},
                 0, table.linear_tasks(shape), reinterpret_cast<T*>(my.products));
  }

  template <typename T>
  static void multiply_gradient(Rows<T> grad_z, Rows<T> input, int64_t depth, Range rows, Range cols, Matrix gradient,
                                bool accumulates, const Workspace& my) {
    multiply<T>({rows.size(), cols.size(), depth, from_column(grad_z, rows.begin), true, from_column(input, cols.begin),
                 gradient, accumulates},
                my);
  }

  const Layer layer_;
  const bool in_bfloat16_;
  Operand weight_;
};

}  // namespace torch_mlp

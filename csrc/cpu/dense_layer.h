// A linear layer in training on the CPU: its output, the gradient of its input, its step of SGD, each for the columns
// that a thread owns.
//
//   y  = act(x W^T + b)        gx = gz W        W moves by a step of SGD with gW = gz^T x
//
// The products are of floats, or of the bfloat16 nearest to them, and then summed in float all the same: one by one
// where there is a matrix unit, else by pairs (kernels.h). W itself is always kept and moved in float.
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

inline bool has_unit() { return kernels().unit_into_float.product; }

// A matrix as the products take it: its values, and in bfloat16 the pairs of its columns and of its rows, as far as
// they are needed. To a matrix unit those of its columns are single elements, and it needs no others.
struct Operand {
  Matrix values{};
  Rows<bfloat16_pair> columns{}, rows{};

  // T of a product along the columns, or along the rows.
  template <typename T>
  Rows<T> along_columns() const {
    if constexpr (std::is_same_v<T, float>) {
      return values;
    } else if constexpr (std::is_same_v<T, bfloat16_bits>) {
      return {reinterpret_cast<bfloat16_bits*>(columns.data), 2 * columns.stride};
    } else {
      return columns;
    }
  }
  template <typename T>
  Rows<T> along_rows() const {
    if constexpr (std::is_same_v<T, bfloat16_pair>) {
      return rows;
    } else {
      return along_columns<T>();
    }
  }

  void take_pairs(int64_t row_count, int64_t col_count, bool needs_columns, bool needs_rows, Arena& arena) {
    if (needs_columns || (needs_rows && has_unit())) {
      columns = take_matrix<bfloat16_pair>(row_count, ceil_div(col_count, 2), arena);
    }
    if (needs_rows && !has_unit()) {
      rows = take_matrix<bfloat16_pair>(ceil_div(row_count, 2), col_count, arena);
    }
  }

  // Makes the pairs of some values; both ranges begin at an even number.
  void pair(Range of_rows, Range of_cols) const {
    pair_from({values.data + of_rows.begin * values.stride + of_cols.begin, values.stride}, of_rows, of_cols);
  }

  // The same of values that are not kept.
  void pair_from(ConstMatrix from, Range of_rows, Range of_cols) const {
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
    int64_t bytes = 0;
    as_multiplied([&](auto element) {
      using T = decltype(element);
      const ProductKernels<T>& table = product_kernels<T>();
      const int64_t most = std::max({table.linear_scratch({batch, along<T>(ins), outs}),
                                     table.product_scratch({batch, ins, along<T>(outs), {}, false, {}, {}}),
                                     table.product_scratch({outs, ins, along<T>(batch), {}, true, {}, {}})});
      bytes = most * int64_t(sizeof(T));
    });
    return ceil_div(bytes, int64_t(sizeof(float)));
  }

  // The columns of the output, which begin at output.
  void forward(const Operand& input, int64_t batch, Range cols, Matrix output, const Workspace& my) const {
    const float* bias = layer_.bias.value ? layer_.bias.value + cols.begin : nullptr;
    linear(input, {0, layer_.ins}, batch, cols, bias, layer_.activation, output, my);
  }

  // What some columns of the input, from an even one on, add to z: contiguous, (batch, outs).
  void forward_part(const Operand& input, int64_t batch, Range ins, bool adds_bias, float* z,
                    const Workspace& my) const {
    const float* bias = adds_bias ? layer_.bias.value : nullptr;
    linear(input, ins, batch, {0, layer_.outs}, bias, ActivationKind::Identity, {z, layer_.outs}, my);
  }

  // The columns of the gradient of the input, which begin at grad_input.
  void backward(const Operand& grad_z, int64_t batch, Range cols, Matrix grad_input, const Workspace& my) const {
    as_multiplied([&](auto element) {
      using T = decltype(element);
      multiply<T>({batch, cols.size(), along<T>(layer_.outs), grad_z.along_columns<T>(), false,
                   from_column(weight_.along_rows<T>(), cols.begin), grad_input},
                  my);
    });
  }

  // A step of SGD of some rows and columns of the weight; adds_directly: its gradient is what is to be added.
  void move_weight(Range rows, Range cols, const Operand& grad_z, const Operand& input, int64_t batch,
                   const SgdStep& step, bool adds_directly, const Workspace& my) const {
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t count = adds_directly ? rows.size() : std::min(kUpdateRows, rows.end - row);
      const Parameter part = layer_.weight.from(row * layer_.ins + cols.begin);
      const Matrix gradient = adds_directly ? Matrix{part.value, layer_.ins} : Matrix{my.gradient, cols.size()};
      as_multiplied([&](auto element) {
        using T = decltype(element);
        multiply<T>({count, cols.size(), along<T>(batch), from_column(grad_z.along_rows<T>(), row), true,
                     from_column(input.along_rows<T>(), cols.begin), gradient, adds_directly},
                    my);
      });
      for (int64_t r = 0; r < count && !adds_directly; ++r) {
        move(part.from(r * layer_.ins), gradient.data + r * gradient.stride, cols.size(), step);
      }
      row += count;
    }
    pair_weight(rows, cols);
  }

 private:
  // Calls body with an element of the operands.
  template <typename Body>
  void as_multiplied(const Body& body) const {
    !in_bfloat16_ ? body(float{}) : has_unit() ? body(bfloat16_bits{}) : body(bfloat16_pair{});
  }

  // How many elements hold so many numbers along the depth.
  template <typename T>
  static int64_t along(int64_t count) {
    return std::is_same_v<T, bfloat16_pair> ? ceil_div(count, 2) : count;
  }

  void linear(const Operand& input, Range ins, int64_t batch, Range outs, const float* bias, ActivationKind activation,
              Matrix output, const Workspace& my) const {
    as_multiplied([&](auto element) {
      using T = decltype(element);
      const ProductKernels<T>& table = product_kernels<T>();
      const LinearShape shape{batch, along<T>(ins.size()), outs.size()};
      const int64_t first = along<T>(ins.begin);
      const Rows<T> weight = weight_.along_columns<T>();
      table.linear({shape,
                    from_column(input.along_columns<T>(), first),
                    {weight.data + outs.begin * weight.stride + first, weight.stride},
                    bias,
                    output,
                    activation},
                   0, table.linear_tasks(shape), reinterpret_cast<T*>(my.products));
    });
  }

  const Layer layer_;
  const bool in_bfloat16_;
  Operand weight_;
};

}  // namespace torch_mlp

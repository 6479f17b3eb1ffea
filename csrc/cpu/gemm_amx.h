// Products of matrices by AMX, the matrix unit of Intel's processors since Sapphire Rapids. It multiplies bfloat16 and
// sums in float. A float is split into three bfloat16 (split_floats.h): the six products of these that count take 6/16
// of the time of one product of floats, and their sums have no more rounding errors. What the three parts cannot hold
// is multiplied by the tiles of gemm.h. Products of bfloat16 stay float, or are rounded to bfloat16 once, at the end.
//
// The longer operand streams, unless it lies in memory transposed:
//
//   product                  streams    resident
//   linear   y^T = W x^T     W          x^T
//            y = x W^T       x          W^T
//   product  gz W            W or gz    gz or W
//   product  gz^T x          x          gz^T
//
// In bfloat16 a matrix that lies in memory as in tiles is not copied; gz always streams past W, for a band of W would
// be read from all of its rows.
//
// unit_multiply.h says what that means. For level.h.
#pragma once

#include "unit_multiply.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

constexpr int64_t kRowsToFinish = 8;  // at a time

// c = act(sums + bias), or that of c + sums; bias may be null.
template <ActivationKind kind, bool adds, bool is_whole, typename T>
TORCH_MLP_INLINE void finish_rows(Matrix sums, const float* bias, int64_t rows, int64_t cols, Rows<T> c) {
  vec of_bias[kBand / kLanes] = {};
  TORCH_MLP_UNROLL
  for (int64_t j = 0; bias && j < kBand; j += kLanes) {
    of_bias[j / kLanes] = load_some<is_whole>(bias + j, max(0, min(cols - j, kLanes)));
  }
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_MLP_UNROLL
    for (int64_t j = 0; j < kBand; j += kLanes) {
      const int64_t left = max(0, min(cols - j, kLanes));
      const vec sum = load_some<is_whole>(sums.data + i * sums.stride + j, left);
      T* const to = c.data + i * c.stride + j;
      const vec z = adds ? load_some<is_whole>(to, left) + sum : sum;
      const vec result = activation<kind>(z + of_bias[j / kLanes]);
      is_whole ? store_flushed(to, result) : store_part(to, result, left);
    }
  }
}

// The same of some rows of a block, in a function of its own: it is called between the products of tiles.
template <typename Out>
__attribute__((noinline)) void finish_some_rows(ActivationKind kind, bool adds, int64_t begin, int64_t rows,
                                                int64_t cols, Matrix sums, const float* bias, Rows<Out> c) {
  rows = min(rows - begin, kRowsToFinish);
  sums.data += begin * sums.stride;
  c.data += begin * c.stride;
  dispatch(kind, [&](auto act) {
    const auto finish = [&](auto is_whole) {
      if (kAddsInC<Out> && adds) {
        finish_rows<act.value, kAddsInC<Out>, is_whole.value>(sums, bias, rows, cols, c);
      } else {
        finish_rows<act.value, false, is_whole.value>(sums, bias, rows, cols, c);
      }
    };
    cols == kBand ? finish(std::true_type{}) : finish(std::false_type{});
  });
}

// --- product: c = a b or a^T b. The longer operand streams, but not a^T. ---

template <typename T, typename Out>
bool streams_a(const Product<T, Out>& self) {
  return !self.a_transposed && (std::is_same_v<T, bfloat16_bits> || self.rows > self.cols);
}

template <typename T, typename Out>
int64_t unit_product_tasks(const Product<T, Out>& self) {
  return unit_tasks(self.rows, self.cols);
}

template <typename T, typename Out>
UnitScratch<T, Out> cut(const Product<T, Out>& self) {
  if (streams_a(self)) {
    return {self.cols, self.rows, self.depth};
  }
  const bool are_rows = self.a_transposed && std::is_same_v<T, bfloat16_bits>;
  return {self.rows, self.cols, self.depth, are_rows ? kDepthOfRows : kUnitDepth<T>};
}

template <typename T, typename Out>
int64_t unit_product_scratch(const Product<T, Out>& self) {
  return cut(self).size() * sizeof(float) / sizeof(T);
}

template <typename T, typename Out>
struct UnitProductResult {
  const Product<T, Out>& self;
  float* scratch;

  bool adds(const UnitPart& part) const { return self.accumulates || (kAddsInC<Out> && !part.is_first); }
  Rows<Out> c(const UnitPart& part) const { return {self.c.data + part.row * self.c.stride + part.col, self.c.stride}; }
  bool is_in_place(const UnitPart& part) const {
    return std::is_same_v<Out, float> && part.rows == kBand && part.cols == kBand && !adds(part);
  }

  Matrix block(const UnitPart& part, Matrix spare) const {
    if constexpr (std::is_same_v<Out, float>) {
      return is_in_place(part) ? c(part) : spare;
    } else {
      return spare;
    }
  }
  int64_t steps_to_finish(const UnitPart& part) const {
    const bool is_finished = is_in_place(part) || (!kAddsInC<Out> && !part.is_last);
    return is_finished ? 0 : ceil_div(part.rows, kRowsToFinish);
  }
  void finish(const UnitPart& part, Matrix sums, int64_t step) const {
    finish_some_rows(ActivationKind::Identity, adds(part), step * kRowsToFinish, part.rows, part.cols, sums, nullptr,
                     c(part));
  }

  void multiply_floats(const UnitPart& part) const {
    const Lines<float> a = lines_of(self.a, self.a_transposed).from(part.row, part.p);
    const Product<float> of_floats{part.rows,         part.cols,
                                   part.depth,        {a.data, self.a.stride},
                                   self.a_transposed, {self.b.data + part.p * self.b.stride + part.col, self.b.stride},
                                   c(part),           adds(part)};
    product(of_floats, 0, product_tasks(of_floats), scratch);
  }
};

template <typename T, typename Out>
void unit_product(const Product<T, Out>& self, int64_t begin, int64_t end, T* scratch) {
  const Lines<T> a = lines_of(self.a, self.a_transposed), b = lines_of(self.b, true);
  const UnitScratch<T, Out> sizes = cut(self);
  float* const memory = reinterpret_cast<float*>(scratch);
  const UnitProductResult<T, Out> result{self, memory + sizes.floats()};
  if (streams_a(self)) {
    const UnitWork<T> work(b, self.cols, a, self.rows, self.depth, begin, end);
    multiply_by_unit<true, false>(work, sizes, memory, result);
  } else {
    const UnitWork<T> work(a, self.rows, b, self.cols, self.depth, begin, end);
    if (self.a_transposed) {
      multiply_by_unit<false, true>(work, sizes, memory, result);
    } else if constexpr (std::is_same_v<T, float>) {  // in bfloat16 a streams
      multiply_by_unit<false, false>(work, sizes, memory, result);
    }
  }
}

// --- linear: y = act(x W^T + b) where x streams; else y^T = act(W x^T + b), and W does. The longer one streams. ---

bool streams_x(const LinearShape& shape) { return shape.batch > shape.out_features; }

int64_t unit_linear_tasks(const LinearShape& shape) { return unit_tasks(shape.batch, shape.out_features); }

template <typename T, typename Out>
UnitScratch<T, Out> cut(const LinearShape& shape) {
  return {min(shape.batch, shape.out_features), max(shape.batch, shape.out_features), shape.in_features};
}

template <typename T, typename Out>
int64_t unit_linear_scratch(const LinearShape& shape) {
  return cut<T, Out>(shape).size() * sizeof(float) / sizeof(T);
}

// A quarter of a block, transposed.
void turn_quarter(Matrix sums, int64_t quarter, Matrix turned) {
  const int64_t i = quarter / 2 * kTileSide, j = quarter % 2 * kTileSide;
  vec square[kTileSide];
  load_transposed<true>({sums.data + j * sums.stride + i, sums.stride}, kTileSide, kTileSide, square);
  TORCH_MLP_UNROLL
  for (int l = 0; l < kTileSide; ++l) {
    store(turned.data + (i + l) * turned.stride + j, square[l]);
  }
}

// Of parts of y, or of y^T.
template <bool is_transposed, typename T, typename Out>
struct UnitLinearResult {
  const LinearForward<T, Out>& self;
  Matrix turned;
  float* scratch;
  static constexpr int64_t kTurns = is_transposed ? 4 : 0;

  UnitPart of_y(const UnitPart& part) const {
    return is_transposed
               ? UnitPart{part.col, part.cols, part.row, part.rows, part.p, part.depth, part.is_first, part.is_last}
               : part;
  }
  Rows<Out> y(const UnitPart& part) const {
    return {self.output.data + part.row * self.output.stride + part.col, self.output.stride};
  }
  const float* bias(const UnitPart& part) const { return self.bias && part.is_last ? self.bias + part.col : nullptr; }

  Matrix block(const UnitPart&, Matrix spare) const { return spare; }

  int64_t steps_to_finish(const UnitPart& part) const {
    return kAddsInC<Out> || part.is_last ? kTurns + ceil_div(of_y(part).rows, kRowsToFinish) : 0;
  }
  void finish(const UnitPart& part, Matrix sums, int64_t step) const {
    if (step < kTurns) {
      return turn_quarter(sums, step, turned);
    }
    const UnitPart to = of_y(part);
    finish_some_rows(to.is_last ? self.activation : ActivationKind::Identity, kAddsInC<Out> && !to.is_first,
                     (step - kTurns) * kRowsToFinish, to.rows, to.cols, is_transposed ? turned : sums, bias(to), y(to));
  }

  void multiply_floats(const UnitPart& part) const {
    UnitPart to = of_y(part);
    for (const int64_t end = to.col + to.cols; to.col < end; to.col += kBand) {
      to.cols = min(end - to.col, kBand);
      pack_transposed<float>({self.weight.data + to.col * self.weight.stride + to.p, self.weight.stride}, to.cols,
                             to.depth, scratch);
      const ConstMatrix x{self.input.data + to.row * self.input.stride + to.p, self.input.stride};
      const ConstMatrix transposed_weight{scratch, ceil_div(to.cols, kLanes) * kLanes};
      const Product<float> of_floats{to.rows, to.cols, to.depth, x, false, transposed_weight, y(to), !to.is_first};
      product(of_floats, 0, product_tasks(of_floats), scratch + kBand * to.depth);
      if (to.is_last) {
        for (int64_t row = 0; row < to.rows; row += kRowsToFinish) {
          finish_some_rows(self.activation, false, row, to.rows, to.cols, y(to), bias(to), y(to));
        }
      }
    }
  }
};

template <typename T, typename Out>
void unit_linear(const LinearForward<T, Out>& self, int64_t begin, int64_t end, T* scratch) {
  const auto& [batch, ins, outs] = self.shape;
  const Lines<T> x = lines_of(self.input, false), w = lines_of(self.weight, false);
  const UnitScratch<T, Out> sizes = cut<T, Out>(self.shape);
  float *const memory = reinterpret_cast<float*>(scratch), *const floats = memory + sizes.floats();
  const Matrix turned{memory + sizes.turned(), kBand};
  if (streams_x(self.shape)) {
    multiply_by_unit<true, true>(UnitWork<T>(w, outs, x, batch, ins, begin, end), sizes, memory,
                                 UnitLinearResult<false, T, Out>{self, turned, floats});
  } else {
    multiply_by_unit<true, true>(UnitWork<T>(x, batch, w, outs, ins, begin, end), sizes, memory,
                                 UnitLinearResult<true, T, Out>{self, turned, floats});
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

// The vector kernels of the CPU: what the ops call through raw pointers, once for each instruction set.
//
// level_default.cpp, level_avx2.cpp, level_avx512.cpp, level_avx512_bf16.cpp and level_amx.cpp compile the same sources
// (vector.h, elementwise.h, gemm.h, softmax.h and so on) for one instruction set each, in a namespace of its own;
// kernels() gives the table of the best one that the processor has. Those files include no header of torch and no
// function of the standard library but memcpy, for the linker keeps one copy of an inline function, and it must not be
// one that only some processors can run.
#pragma once

#include <cstdint>
#include <type_traits>

namespace torch_mlp {

enum class ActivationKind { Identity, Sigmoid, Tanh, ReLU, Step };

// The bits of a bfloat16: the upper half of a float.
struct bfloat16_bits {
  uint16_t bits;
};

// Two bfloat16 of adjacent columns, or of adjacent rows, of a matrix; the last one has a zero beside it where their
// number is odd. The first is in the lower half.
struct bfloat16_pair {
  uint32_t bits;
};

// A row-major matrix; adjacent rows are stride elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  template <typename U = T, typename = std::enable_if_t<!std::is_const_v<U>>>
  operator Rows<const U>() const {
    return {data, stride};
  }
};
using ConstMatrix = Rows<const float>;
using Matrix = Rows<float>;

struct LinearShape {
  int64_t batch, in_features, out_features;
};

// T is float or bfloat16_bits, or bfloat16_pair with in_features counted in pairs.
template <typename T, typename Out = float>
struct LinearForward {
  LinearShape shape;
  Rows<const T> input, weight;  // (batch, in_features), (out_features, in_features)
  const float* bias;            // (out_features,) or null
  Rows<Out> output;             // (batch, out_features)
  ActivationKind activation;
};

// The product a b or a^T b into c (rows, cols), summed over depth.
template <typename T, typename Out = float>
struct Product {
  int64_t rows, cols, depth;
  Rows<const T> a;  // (rows, depth), or (depth, rows) where it is transposed
  bool a_transposed;
  Rows<const T> b;  // (depth, cols)
  Rows<Out> c;
  bool accumulates = false;  // c += the product; not in bfloat16, where the sums would be rounded again
};

// What depends on the caches of the processor, see kernels.cpp. How products are cut:
struct Tuning {
  int64_t depth;          // of a tile, about
  int64_t cached_floats;  // of b: where it has no more, c is written row by row, for b stays in cache
  bool copies;            // operands that are unfavourably laid out, where they are used often
  // And whether lines that a softmax will write are fetched before.
  bool fetches_gradient;
};

const Tuning& tuning();

// Both take a part of the result, [begin, end) of the tasks that the *_tasks function counts, and scratch memory for as
// many elements as the *_scratch function says.
template <typename T, typename Out = float>
struct ProductKernels {
  int64_t (*linear_tasks)(const LinearShape&);
  int64_t (*linear_scratch)(const LinearShape&);
  void (*linear)(const LinearForward<T, Out>&, int64_t begin, int64_t end, T* scratch);
  int64_t (*product_tasks)(const Product<T, Out>&);
  int64_t (*product_scratch)(const Product<T, Out>&);
  void (*product)(const Product<T, Out>&, int64_t begin, int64_t end, T* scratch);
};

// A product of bfloat16 as they lie in memory, one by one, into bfloat16.
using Bfloat16Product = Product<bfloat16_bits, bfloat16_bits>;

// Products into bfloat16, summed in float and rounded once. The tasks and the scratch memory of linear are those of
// the pairs.
struct Bfloat16Kernels {
  void (*linear)(const LinearForward<bfloat16_pair, bfloat16_bits>&, int64_t begin, int64_t end,
                 bfloat16_pair* scratch);
  int64_t (*product_tasks)(const Bfloat16Product&);
  int64_t (*product_scratch)(const Bfloat16Product&);
  void (*product)(const Bfloat16Product&, int64_t begin, int64_t end, bfloat16_bits* scratch);
};

template <typename T>
struct ElementwiseKernels {
  // y = act(y)
  void (*activate)(ActivationKind, T* y, int64_t count);
  // gz = gy * act'(z) by y, where gz is not null; sums[j] += the sum over the rows of gz, where sums is not null. gz
  // may be gy.
  void (*activation_backward)(ActivationKind, Rows<const T> gy, Rows<const T> y, Rows<T> gz, double* sums, int64_t rows,
                              int64_t cols);
};

// How many of some labels are classes, and how many are wrong: neither that nor ignore_index.
struct LabelCounts {
  int64_t classes, wrong;
};

// What the gradient of a row of logits is made of, in the order of computation:
//   grad[i, c] = numerator[i] / sum[i] * exp(x[i, c] - maximum[i])
//                - (c == label[i] ? at_label[i] : offset[i] * weight[c])
// offset being 0 and weight 1 where they are null.
template <typename T, typename compute = float>
struct GradientTerms {
  const T* weight;
  const compute *numerator, *offset, *at_label;

  // Those of the rows from i on.
  GradientTerms from(int64_t i) const { return {weight, numerator + i, offset ? offset + i : offset, at_label + i}; }
};

// x is a contiguous matrix (rows, classes), label[i] a class or -1 for a row that does not count, whose gradient is 0.
template <typename T>
struct SoftmaxKernels {
  // maximum[i] = max_c x[i, c], sum[i] = sum_c exp(x[i, c] - maximum[i]), at_label[i] = x[i, label[i]]
  void (*statistics)(const T* x, const int64_t* label, int64_t rows, int64_t classes, float* maximum, float* sum,
                     float* at_label);
  // sum_c weight[c] * (maximum - x[c]), weight being 1 where it is null
  double (*deficit)(const T* x, const T* weight, int64_t classes, float maximum);
  // grad may be x
  void (*gradient)(const T* x, T* grad, int64_t rows, int64_t classes, const int64_t* label, const float* maximum,
                   const float* sum, const GradientTerms<T>&);
  // Both at once; in float each exponential is computed once. grad may be x.
  void (*statistics_and_gradient)(const T* x, T* grad, int64_t rows, int64_t classes, const int64_t* label,
                                  const GradientTerms<T>&, float* maximum, float* sum, float* at_label);
};

// Binary cross-entropy of count logits, see logistic.h; weight and pos_weight are 1 where they are null.
template <typename T>
struct LogisticLoss {
  const T *x, *y, *weight, *pos_weight;
  int64_t count;
};

template <typename T>
struct LogisticKernels {
  // The sum of the losses, each of which also goes to loss where that is not null.
  double (*loss)(const LogisticLoss<T>&, T* loss);
  // scale * grad_output times the derivatives by x and by y, each where it is not null; grad_output is 1 where it is.
  void (*gradient)(const LogisticLoss<T>&, const T* grad_output, float scale, T* grad_x, T* grad_y);
};

// A step of stochastic gradient descent: velocity = momentum * velocity + (gradient + weight_decay * value), and value
// moves by -lr times that; without velocity by -lr times the parenthesis.
struct SgdStep {
  float lr, momentum, weight_decay;
};

// The first layer on images that skips zero pixels, see pixels.h: z (images, width) = the rows of bytes, each looked up
// in values, times a panel (features, width) of W^T.
struct PixelForward {
  const uint8_t* const* rows;
  int64_t images, features;
  const float* values;  // of the 256 bytes
  const float* panel;
  int64_t width;
  float* z;
};

// A step of SGD of such a panel.
struct PixelUpdate {
  const uint8_t* columns;  // (features, images), images being a multiple of 64
  int64_t images, features;
  const float* values;
  float* panel;
  float* velocity;  // like panel, or null
  int64_t width;
  ConstMatrix grad_z;  // (images, width)
  SgdStep step;
};

struct PixelKernels {
  int64_t most_width;  // of a panel, which is a multiple of lanes wide
  void (*pack)(ConstMatrix w, int64_t count, int64_t features, float* panel);
  // w (count, features) from a panel, row being added to each of its rows
  void (*unpack)(const float* panel, int64_t width, const float* row, int64_t features, Matrix w, int64_t count);
  // columns[k * stride + i] = rows[i][k], for 64 rows
  void (*transpose)(const uint8_t* const* rows, int64_t features, uint8_t* columns, int64_t stride);
  int64_t (*sum)(const uint8_t* bytes, int64_t count);
  void (*forward)(const PixelForward&);
  // y[i, j] = activation(z[i, j] + row_factor[i] * row[j] + offset[j]), z contiguous and a multiple of lanes wide
  void (*finish)(ActivationKind, const float* z, const float* row_factor, const float* row, const float* offset,
                 Matrix y, int64_t rows, int64_t cols);
  void (*update)(const PixelUpdate&);
};

struct Kernels {
  const char* name;
  int64_t lanes;  // floats of a vector

  ProductKernels<float> products_float;
  // By a matrix unit, see gemm_amx.h; all are null where the processor has none.
  ProductKernels<float> unit_float;
  ProductKernels<bfloat16_bits, bfloat16_bits> unit_bfloat16;
  ProductKernels<bfloat16_bits> unit_into_float;
  // Of bfloat16 by vectors; all are null where the processor does not multiply pairs.
  ProductKernels<bfloat16_pair> products_bfloat16;
  Bfloat16Kernels into_bfloat16;
  // The pairs of x in bfloat16: of columns (rows, ceil(cols / 2)), and of rows (ceil(rows / 2), cols).
  void (*pair_columns)(ConstMatrix x, int64_t rows, int64_t cols, Rows<bfloat16_pair> pairs);
  void (*pair_rows)(ConstMatrix x, int64_t rows, int64_t cols, Rows<bfloat16_pair> pairs);

  ElementwiseKernels<float> elementwise_float;
  ElementwiseKernels<bfloat16_bits> elementwise_bfloat16;
  SoftmaxKernels<float> softmax_float;
  SoftmaxKernels<bfloat16_bits> softmax_bfloat16;
  // label[i] = target[i] where that is a class, else -1
  LabelCounts (*labels)(const int64_t* target, int64_t count, int64_t classes, int64_t ignore_index, int64_t* label);
  // log_sum[i] = log(sum[i]), loss[i] = log_sum[i] + (maximum[i] - at_label[i]), or 0 where label[i] is -1
  void (*losses)(const float* maximum, const float* sum, const float* at_label, const int64_t* label, int64_t count,
                 float* log_sum, double* loss);
  LogisticKernels<float> logistic_float;
  LogisticKernels<bfloat16_bits> logistic_bfloat16;

  PixelKernels pixels;
  // y = scale * x + shift
  void (*normalize_bytes)(const uint8_t* x, int64_t count, float scale, float shift, float* y);
  void (*normalize_floats)(const float* x, int64_t count, float scale, float shift, float* y);
  // velocity may be null
  void (*sgd)(float* value, float* velocity, const float* gradient, int64_t count, const SgdStep&);

  // rounds times multiply_adds_of_round multiplications and additions, as fast as the processor can
  float (*multiply_adds)(int64_t rounds);
  int64_t multiply_adds_of_round;
  // The same of floats in parts by a matrix unit; null where there is none.
  float (*split_multiply_adds)(int64_t rounds);
  int64_t split_multiply_adds_of_round;
};

namespace level_default {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace level_avx2 {
extern const Kernels kernels;
}
namespace level_avx512 {
extern const Kernels kernels;
}
namespace level_avx512_bf16 {
extern const Kernels kernels;
}
namespace level_amx {
extern const Kernels kernels;
}
#endif

// The table for this processor, or the one that TORCH_MLP_CPU_CAPABILITY (default, avx2, avx512, avx512_bf16 or amx)
// names; chosen at the first call.
const Kernels& kernels();

// Those of products into float by vectors, or of single bfloat16 by a matrix unit.
template <typename T>
const ProductKernels<T>& product_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().products_float;
  } else if constexpr (std::is_same_v<T, bfloat16_bits>) {
    return kernels().unit_into_float;
  } else {
    return kernels().products_bfloat16;
  }
}

// Whose matrix products are the faster ones on this processor, as far as it was measured: see products.cpp.
enum class Products {
  Kernels,         // AVX2 and AVX-512, but for Intel; and wherever a level is forced, to test and measure it
  KernelsIfSmall,  // Intel's: MKL is tuned for them, and the better one for gradients of large batches
  Library,         // the level "default": torch's library has kernels of its own for most processors
};

Products faster_products();

}  // namespace torch_mlp

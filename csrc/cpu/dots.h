// The linear map by dot products along in_features: what a few rows of x, or a few outputs, cost least by, for nothing
// is packed. A task is kDotTaskRows rows of x and kDotTaskOutputs of W. For level.h.
#pragma once

#include "exp.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

constexpr int kDotRows = kLanes == 16 ? 4 : 2;
constexpr int kDotOutputs = 4;
constexpr int64_t kDotTaskRows = 16, kDotTaskOutputs = 16;

// sum[i * outputs + j] += x_i w_j for the first count floats of x and w, or a whole vector of them.
template <int rows, int outputs, bool is_whole>
TORCH_MLP_INLINE void add_dots(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t count,
                               vec* sum) {
  vec of_w[outputs];
  TORCH_MLP_UNROLL
  for (int j = 0; j < outputs; ++j) {
    of_w[j] = load_some<is_whole>(w + j * w_stride, count);
  }
  TORCH_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    const vec of_x = load_some<is_whole>(x + i * x_stride, count);
    TORCH_MLP_UNROLL
    for (int j = 0; j < outputs; ++j) {
      sum[i * outputs + j] += of_x * of_w[j];
    }
  }
}

template <int rows, int outputs>
__attribute__((noinline)) void dot_tile(const LinearForward<float>& self, int64_t row, int64_t n) {
  constexpr int count = rows * outputs, groups = (count + kLanes - 1) / kLanes;
  const int64_t depth = self.shape.in_features, whole = whole_vectors(depth);
  const int64_t x_stride = self.input.stride, w_stride = self.weight.stride;
  const float *x = self.input.data + row * x_stride, *w = self.weight.data + n * w_stride;
  vec sum[groups * kLanes] = {};
  for (int64_t p = 0; p < whole; p += kLanes) {
    add_dots<rows, outputs, true>(x + p, x_stride, w + p, w_stride, kLanes, sum);
  }
  if (whole < depth) {
    add_dots<rows, outputs, false>(x + whole, x_stride, w + whole, w_stride, depth - whole, sum);
  }

  float z[groups * kLanes], of_bias[groups * kLanes] = {};
  if (self.bias) {
    TORCH_MLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      memcpy(of_bias + i * outputs, self.bias + n, outputs * sizeof(float));
    }
  }
  dispatch(self.activation, [&](auto act) {
    TORCH_MLP_UNROLL
    for (int g = 0; g < groups; ++g) {
      vec group[kLanes];
      memcpy(group, sum + g * kLanes, sizeof(group));
      store(z + g * kLanes, activation<act.value>(sums_of(group) + load(of_bias + g * kLanes)));
    }
  });
  TORCH_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    memcpy(self.output.data + (row + i) * self.output.stride + n, z + i * outputs, outputs * sizeof(float));
  }
}

template <int rows = kDotRows, int outputs = kDotOutputs>
TORCH_MLP_INLINE void dot_tile_of(int64_t row_count, int64_t output_count, const LinearForward<float>& self,
                                  int64_t row, int64_t n) {
  if (row_count < rows) {
    if constexpr (rows > 1) {
      dot_tile_of<rows - 1, outputs>(row_count, output_count, self, row, n);
    }
  } else if (output_count < outputs) {
    if constexpr (outputs > 1) {
      dot_tile_of<rows, outputs - 1>(row_count, output_count, self, row, n);
    }
  } else {
    dot_tile<rows, outputs>(self, row, n);
  }
}

void linear_by_dots(const LinearForward<float>& self, int64_t begin, int64_t end) {
  const int64_t row_tasks = ceil_div(self.shape.batch, kDotTaskRows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first_row = task % row_tasks * kDotTaskRows, first_n = task / row_tasks * kDotTaskOutputs;
    const int64_t last_row = min(first_row + kDotTaskRows, self.shape.batch);
    const int64_t last_n = min(first_n + kDotTaskOutputs, self.shape.out_features);
    for (int64_t n = first_n; n < last_n; n += kDotOutputs) {
      for (int64_t row = first_row; row < last_row; row += kDotRows) {
        dot_tile_of(min(last_row - row, kDotRows), min(last_n - n, kDotOutputs), self, row, n);
      }
    }
  }
}

int64_t dot_tasks(const LinearShape& shape) {
  return ceil_div(shape.batch, kDotTaskRows) * ceil_div(shape.out_features, kDotTaskOutputs);
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

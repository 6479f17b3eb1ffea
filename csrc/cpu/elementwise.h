// The activation of many values, and its backward pass with the sums over the rows. For level.h.
#pragma once

#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

template <typename T>
void activate(ActivationKind kind, T* y, int64_t count) {
  dispatch(kind, [&](auto act) {
    const int64_t whole = whole_vectors(count);
    for (int64_t i = 0; i < whole; i += kLanes) {
      store(y + i, activation<act.value>(load(y + i)));
    }
    if (whole < count) {
      store_part(y + whole, activation<act.value>(load_part(y + whole, count - whole)), count - whole);
    }
  });
}

// A column of `vectors` vectors, so that the sums stay in registers.
template <ActivationKind kind, int vectors, typename T>
void activation_backward_columns(const T* gy, const T* y, T* gz, int64_t gz_stride, double* sums, int64_t rows,
                                 int64_t stride, int64_t cols) {
  const bool is_whole = cols == vectors * kLanes;  // else there is one vector, and it is cols wide
  DoubleSum sum[vectors];
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      const int64_t at = i * stride + j * kLanes;
      const vec grad = is_whole ? load(gy + at) : load_part(gy + at, cols);
      const vec value = activation_gradient<kind>(grad, is_whole ? load(y + at) : load_part(y + at, cols));
      sum[j].add(value);
      if (gz) {
        T* to = gz + i * gz_stride + j * kLanes;
        is_whole ? store(to, value) : store_part(to, value, cols);
      }
    }
  }
  if (sums) {
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      sum[j].add_to(sums + j * kLanes, is_whole ? kLanes : cols);
    }
  }
}

template <typename T>
void activation_backward(ActivationKind kind, const T* gy, const T* y, T* gz, int64_t gz_stride, double* sums,
                         int64_t rows, int64_t cols) {
  dispatch(kind, [&](auto act) {
    constexpr int vectors = 4;
    int64_t j = 0;
    for (; j + vectors * kLanes <= cols; j += vectors * kLanes) {
      activation_backward_columns<act.value, vectors>(gy + j, y + j, gz ? gz + j : gz, gz_stride,
                                                      sums ? sums + j : sums, rows, cols, vectors * kLanes);
    }
    for (; j < cols; j += kLanes) {
      activation_backward_columns<act.value, 1>(gy + j, y + j, gz ? gz + j : gz, gz_stride, sums ? sums + j : sums,
                                                rows, cols, min(kLanes, cols - j));
    }
  });
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

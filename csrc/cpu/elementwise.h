// What is done value by value: the activation, its backward pass with the sums over the rows, normalisation, a step of
// SGD. For level.h.
#pragma once

#include "exp.h"

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

// A column of `vectors` vectors, so that the sums stay in registers. The rows below are fetched meanwhile, for the
// processor does not see that they are next.
template <ActivationKind kind, int vectors, typename T>
void activation_backward_columns(Rows<const T> gy, Rows<const T> y, Rows<T> gz, double* sums, int64_t rows,
                                 int64_t cols) {
  constexpr int64_t ahead = 6;  // rows
  constexpr int line = 64 / sizeof(T);
  const bool is_whole = cols == vectors * kLanes;  // else there is one vector, and it is cols wide
  DoubleSum sum[vectors];
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      const T *of_gy = gy.data + i * gy.stride + j * kLanes, *of_y = y.data + i * y.stride + j * kLanes;
      T* to = gz.data ? gz.data + i * gz.stride + j * kLanes : nullptr;
      if (j * kLanes % line == 0) {
        __builtin_prefetch(of_gy + ahead * gy.stride);
        __builtin_prefetch(of_y + ahead * y.stride);
        if (to) {
          __builtin_prefetch(to + ahead * gz.stride, 1);
        }
      }
      const vec grad = is_whole ? load(of_gy) : load_part(of_gy, cols);
      const vec value = activation_gradient<kind>(grad, is_whole ? load(of_y) : load_part(of_y, cols));
      sum[j].add(value);
      if (to) {
        is_whole ? store_flushed(to, value) : store_part(to, value, cols);
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
void activation_backward(ActivationKind kind, Rows<const T> gy, Rows<const T> y, Rows<T> gz, double* sums, int64_t rows,
                         int64_t cols) {
  dispatch(kind, [&](auto act) {
    constexpr int vectors = sizeof(T) == 2 && kLanes == 16 ? 8 : 4;  // two registers of sums each
    const auto columns = [&](int64_t j, auto count, int64_t width) {
      activation_backward_columns<act.value, count.value, T>({gy.data + j, gy.stride}, {y.data + j, y.stride},
                                                             {gz.data ? gz.data + j : gz.data, gz.stride},
                                                             sums ? sums + j : sums, rows, width);
    };
    int64_t j = 0;
    for (; j + vectors * kLanes <= cols; j += vectors * kLanes) {
      columns(j, std::integral_constant<int, vectors>{}, vectors * kLanes);
    }
    for (; j < cols; j += kLanes) {
      columns(j, std::integral_constant<int, 1>{}, min(kLanes, cols - j));
    }
  });
}

// y = scale * x + shift
template <typename T>
void normalize(const T* x, int64_t count, float scale, float shift, float* y) {
  for (int64_t k = 0; k < count; ++k) {
    y[k] = float(x[k]) * scale + shift;
  }
}

// value moves by a step of SGD.
template <bool has_velocity>
TORCH_MLP_INLINE void sgd_vector(float* value, float* velocity, vec gradient, const SgdStep& step) {
  const vec before = load(value);
  vec direction = step.weight_decay * before + gradient;
  if (has_velocity) {
    direction += step.momentum * load(velocity);
    store(velocity, direction);
  }
  store(value, before - step.lr * direction);
}

void sgd(float* value, float* velocity, const float* gradient, int64_t count, const SgdStep& step) {
  const int64_t whole = whole_vectors(count);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vec g = load(gradient + i);
    velocity ? sgd_vector<true>(value + i, velocity + i, g, step) : sgd_vector<false>(value + i, nullptr, g, step);
  }
  for (int64_t i = whole; i < count; ++i) {
    float direction = step.weight_decay * value[i] + gradient[i];
    if (velocity) {
      direction += step.momentum * velocity[i];
      velocity[i] = direction;
    }
    value[i] -= step.lr * direction;
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

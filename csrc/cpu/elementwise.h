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

// The pairs of columns of x, for the odd last one with a zero.
template <size_t... lane>
TORCH_MLP_INLINE vec pairs_in_order(vec left, vec right, std::index_sequence<lane...>) {
  return pairs_of(TORCH_MLP_SHUFFLE(left, right, int(2 * lane)...),
                  TORCH_MLP_SHUFFLE(left, right, int(2 * lane + 1)...));
}

void pair_columns(ConstMatrix x, int64_t rows, int64_t cols, Rows<bfloat16_pair> pairs) {
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = x.data + i * x.stride;
    bfloat16_pair* to = pairs.data + i * pairs.stride;
    int64_t j = 0;
    for (; j + 2 * kLanes <= cols; j += 2 * kLanes) {
      store(to + j / 2, pairs_in_order(load(from + j), load(from + j + kLanes), lanes));
    }
    if (const int64_t left = cols - j; left > 0) {
      const vec first = load_part(from + j, min(left, kLanes));
      const vec second = left > kLanes ? load_part(from + j + kLanes, left - kLanes) : vec{};
      store_part(to + j / 2, pairs_in_order(first, second, lanes), ceil_div(left, 2));
    }
  }
}

// The pairs of rows of x, for the odd last one with zeros.
void pair_rows(ConstMatrix x, int64_t rows, int64_t cols, Rows<bfloat16_pair> pairs) {
  const int64_t whole = whole_vectors(cols), rest = cols - whole;
  for (int64_t i = 0; i < rows; i += 2) {
    const float* from = x.data + i * x.stride;
    bfloat16_pair* to = pairs.data + i / 2 * pairs.stride;
    const bool is_pair = i + 1 < rows;
    for (int64_t j = 0; j < whole; j += kLanes) {
      store(to + j, pairs_of(load(from + j), is_pair ? load(from + x.stride + j) : vec{}));
    }
    if (rest) {
      const vec second = is_pair ? load_part(from + x.stride + whole, rest) : vec{};
      store_part(to + whole, pairs_of(load_part(from + whole, rest), second), rest);
    }
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

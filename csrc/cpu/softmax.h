// The parts of softmax cross-entropy that visit every logit. For level.h.
#pragma once

#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// Up to so many classes, the rows and not the classes of a row lie in the lanes.
constexpr int64_t kMostLaneClasses = kLanes;

// The maxima and sums of kLanes rows (or count of them, the last rows) of at most kLanes classes.
template <typename T>
TORCH_MLP_INLINE void statistics_of_rows(const T* x, int64_t count, int64_t classes, float* maximum, float* sum) {
  vec square[kLanes];
  TORCH_MLP_UNROLL
  for (int l = 0; l < kLanes; ++l) {
    square[l] = l < count ? load_part(x + l * classes, classes) : vec{};
  }
  transpose(square);
  vec most = square[0];
  TORCH_MLP_UNROLL
  for (int c = 1; c < kLanes; ++c) {
    most = c < classes ? maximum_of(most, square[c]) : most;
  }
  vec total{};
  TORCH_MLP_UNROLL
  for (int c = 0; c < kLanes; ++c) {
    if (c < classes) {
      total += exp(square[c] - most);
    }
  }
  store_part(maximum, most, count);
  store_part(sum, total, count);
}

template <typename T>
TORCH_MLP_INLINE void statistics_of_row(const T* x, int64_t classes, float& maximum, float& sum) {
  constexpr int vectors = 4;  // in flight at once
  const int64_t whole = whole_vectors(classes), unrolled = whole / (vectors * kLanes) * (vectors * kLanes);
  vec most[vectors];
  TORCH_MLP_UNROLL
  for (int j = 0; j < vectors; ++j) {
    most[j] = broadcast(-__builtin_inff());
  }
  int64_t c = 0;
  for (; c < unrolled; c += vectors * kLanes) {
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      most[j] = maximum_of(most[j], load(x + c + j * kLanes));
    }
  }
  for (; c < whole; c += kLanes) {
    most[0] = maximum_of(most[0], load(x + c));
  }
  maximum = maximum_of(maximum_of(maximum_of(most[0], most[1]), maximum_of(most[2], most[3])));
  for (; c < classes; ++c) {
    const float value = load_part(x + c, 1)[0];
    maximum = value > maximum ? value : maximum;
  }

  vec total[vectors] = {};
  for (c = 0; c < unrolled; c += vectors * kLanes) {
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      total[j] += exp(load(x + c + j * kLanes) - maximum);
    }
  }
  for (; c < whole; c += kLanes) {
    total[0] += exp(load(x + c) - maximum);
  }
  if (c < classes) {
    vec last = exp(load_part(x + c, classes - c) - maximum);
    for (int64_t l = classes - c; l < kLanes; ++l) {
      last[l] = 0;
    }
    total[1] += last;
  }
  sum = sum_of((total[0] + total[1]) + (total[2] + total[3]));
}

// A maximum of -inf or NaN makes every exp NaN, as it should: softmax has no value there.
template <typename T>
void statistics(const T* x, int64_t rows, int64_t classes, float* maximum, float* sum) {
  if (classes <= kMostLaneClasses) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      statistics_of_rows(x + i * classes, min(rows - i, kLanes), classes, maximum + i, sum + i);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      statistics_of_row(x + i * classes, classes, maximum[i], sum[i]);
    }
  }
}

template <typename T>
float deficit(const T* x, const T* weight, int64_t classes, float maximum) {
  vec total{};
  int64_t c = 0;
  for (; c < whole_vectors(classes); c += kLanes) {
    const vec value = maximum - load(x + c);
    total += weight ? load(weight + c) * value : value;
  }
  float sum = sum_of(total);
  for (; c < classes; ++c) {
    const float value = maximum - load_part(x + c, 1)[0];
    sum += weight ? load_part(weight + c, 1)[0] * value : value;
  }
  return sum;
}

template <typename T>
void gradient(const T* x, const T* weight, T* grad, int64_t classes, float maximum, float factor, float offset,
              int64_t target, float at_target) {
  vec_int lane;
  for (int l = 0; l < kLanes; ++l) {
    lane[l] = l;
  }
  const auto value = [&](int64_t c, vec logits, vec of_weight) __attribute__((always_inline)) {
    const int64_t place = target - c;  // in this vector, if it lies in it
    const vec_int is_target = lane == (place >= 0 && place < kLanes ? int32_t(place) : -1);
    const vec p = exp(logits - maximum) - (vec)(is_target & (vec_int)broadcast(at_target));
    return factor * p - offset * of_weight;
  };
  const int64_t whole = whole_vectors(classes), left = classes - whole;
  for (int64_t c = 0; c < whole; c += kLanes) {
    store(grad + c, value(c, load(x + c), weight ? load(weight + c) : broadcast(1.0f)));
  }
  if (left) {
    store_part(grad + whole,
               value(whole, load_part(x + whole, left), weight ? load_part(weight + whole, left) : broadcast(1.0f)),
               left);
  }
}

void log(const float* x, float* y, int64_t count) {
  const int64_t whole = whole_vectors(count);
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(y + i, log(load(x + i)));
  }
  if (whole < count) {
    store_part(y + whole, log(load_part(x + whole, count - whole)), count - whole);
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

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
    most = c < classes ? maximum_of(square[c], most) : most;
  }
  vec total{};
  TORCH_MLP_UNROLL
  for (int c = 0; c < kLanes; ++c) {
    if (c < classes) {
      total += exp_below_overflow(square[c] - most);
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
      most[j] = maximum_of(load(x + c + j * kLanes), most[j]);
    }
  }
  for (; c < whole; c += kLanes) {
    most[0] = maximum_of(load(x + c), most[0]);
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
      total[j] += exp_below_overflow(load(x + c + j * kLanes) - maximum);
    }
  }
  for (; c < whole; c += kLanes) {
    total[0] += exp_below_overflow(load(x + c) - maximum);
  }
  if (c < classes) {
    vec last = exp_below_overflow(load_part(x + c, classes - c) - maximum);
    for (int64_t l = classes - c; l < kLanes; ++l) {
      last[l] = 0;
    }
    total[1] += last;
  }
  DoubleSum of_lanes;
  TORCH_MLP_UNROLL
  for (int j = 0; j < vectors; ++j) {
    of_lanes.add(total[j]);
  }
  sum = float(of_lanes.total());
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
double deficit(const T* x, const T* weight, int64_t classes, float maximum) {
  DoubleSum sum;
  const int64_t whole = whole_vectors(classes), left = classes - whole;
  for (int64_t c = 0; c < whole; c += kLanes) {
    const vec value = maximum - load(x + c);
    sum.add(weight ? load(weight + c) * value : value);
  }
  double total = sum.total();
  if (left) {
    const vec value = maximum - load_part(x + whole, left);
    const vec weighted = weight ? load_part(weight + whole, left) * value : value;
    for (int64_t l = 0; l < left; ++l) {
      total += weighted[l];
    }
  }
  return total;
}

// Gives exp(x - maximum) of the vector.
template <bool has_offset, bool is_whole, typename T>
TORCH_MLP_INLINE vec gradient_of_vector(const T* x, const T* weight, T* grad, int64_t count, float maximum,
                                        float factor, float offset) {
  const vec of_x = exp_below_overflow(load_some<is_whole>(x, count) - maximum);
  vec value = factor * of_x;
  if constexpr (has_offset) {
    value -= offset * (weight ? load_some<is_whole>(weight, count) : broadcast(1.0f));
  }
  store_some<is_whole>(grad, value, count);
  return of_x;
}

template <bool has_offset, typename T>
TORCH_MLP_INLINE float gradient_of_row(const T* x, const T* weight, T* grad, int64_t classes, float maximum,
                                       float factor, float offset, int64_t target) {
  const int64_t whole = whole_vectors(classes);
  vec last{};
  for (int64_t c = 0; c < whole; c += kLanes) {
    last = gradient_of_vector<has_offset, true>(x + c, weight ? weight + c : weight, grad + c, kLanes, maximum, factor,
                                                offset);
  }
  if (whole < classes) {
    last = gradient_of_vector<has_offset, false>(x + whole, weight ? weight + whole : weight, grad + whole,
                                                 classes - whole, maximum, factor, offset);
  }
  if (classes <= kLanes) {
    float of_x[kLanes];
    store(of_x, last);
    return of_x[target];
  }
  return exp_below_overflow(load_part(x + target, 1) - maximum)[0];
}

template <typename T>
void gradient(const T* x, const T* weight, T* grad, int64_t rows, int64_t classes, const float* maximum,
              const float* factor, const float* offset, const int64_t* target, float* of_target) {
  for (int64_t i = 0; i < rows; ++i, x += classes, grad += classes) {
    const int64_t c = uint64_t(target[i]) < uint64_t(classes) ? target[i] : 0;  // 0 for a row that is ignored
    of_target[i] = offset ? gradient_of_row<true>(x, weight, grad, classes, maximum[i], factor[i], offset[i], c)
                          : gradient_of_row<false>(x, weight, grad, classes, maximum[i], factor[i], 0, c);
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

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
  if (c < classes) {
    most[1] = maximum_of(first_lanes(load_part(x + c, classes - c), classes - c, most[1]), most[1]);
  }
  maximum = maximum_of(maximum_of(maximum_of(most[0], most[1]), maximum_of(most[2], most[3])));

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
    total[1] += first_lanes(exp_below_overflow(load_part(x + c, classes - c) - maximum), classes - c, vec{});
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

template <bool has_offset, bool is_whole, typename T>
TORCH_MLP_INLINE vec gradient_of_vector(const T* x, const T* weight, int64_t count, float maximum, float factor,
                                        float offset) {
  const vec value = factor * exp_below_overflow(load_some<is_whole>(x, count) - maximum);
  return has_offset ? value - offset * (weight ? load_some<is_whole>(weight, count) : broadcast(1.0f)) : value;
}

template <bool has_offset, typename T>
TORCH_MLP_INLINE void gradient_of_row(const T* x, const T* weight, T* grad, int64_t classes, float maximum,
                                      float factor, float offset, int64_t target, float at_target) {
  const int64_t whole = whole_vectors(classes);
  for (int64_t c = 0; c < whole; c += kLanes) {
    store(grad + c,
          gradient_of_vector<has_offset, true>(x + c, weight ? weight + c : weight, kLanes, maximum, factor, offset));
  }
  if (whole < classes) {
    const int64_t left = classes - whole;
    store_part(grad + whole,
               gradient_of_vector<has_offset, false>(x + whole, weight ? weight + whole : weight, left, maximum, factor,
                                                     offset),
               left);
  }
  if (uint64_t(target) < uint64_t(classes)) {
    store_part(grad + target,
               gradient_of_vector<false, false>(x + target, weight, 1, maximum, factor, offset) - at_target, 1);
  }
}

// To which row and class the elements of a vector belong.
struct Place {
  vec_int row, of_class;
};

void place(Place* places, int64_t classes) {
  for (int64_t at = 0, row = 0, c = 0; at < classes * kLanes; ++at) {
    places[at / kLanes].row[at % kLanes] = int32_t(row);
    places[at / kLanes].of_class[at % kLanes] = int32_t(c);
    if (++c == classes) {
      c = 0;
      ++row;
    }
  }
}

// kLanes rows (or count of them, the last rows) of at most kLanes classes: vectors of adjacent elements, whatever rows
// they belong to, for which the values of each row are brought to its lanes.
template <bool has_offset, typename T>
TORCH_MLP_INLINE void gradient_of_rows(const T* x, const T* weight, T* grad, int64_t count, int64_t classes,
                                       const Place* places, const float* maximum, const float* factor,
                                       const float* offset, const int64_t* target, const float* at_target) {
  const auto of_rows = [&](const float* values) { return load_part(values, count); };
  const vec of_maximum = of_rows(maximum), of_factor = of_rows(factor), of_at_target = of_rows(at_target);
  const vec of_offset = has_offset ? of_rows(offset) : vec{};
  const vec of_weight = has_offset && weight ? load_part(weight, classes) : broadcast(1.0f);
  vec_int of_target{};
  for (int64_t i = 0; i < count; ++i) {
    of_target[i] = int32_t(target[i]);
  }
  for (int64_t at = 0; at < count * classes; at += kLanes) {
    const auto [row, of_class] = places[at / kLanes];
    const int64_t left = min(count * classes - at, kLanes);
    const vec of_x = left == kLanes ? load(x + at) : load_part(x + at, left);
    const vec of_softmax = permute(of_factor, row) * exp_below_overflow(of_x - permute(of_maximum, row));
    const vec elsewhere = has_offset ? of_softmax - permute(of_offset, row) * permute(of_weight, of_class) : of_softmax;
    const vec value = of_class == permute(of_target, row) ? of_softmax - permute(of_at_target, row) : elsewhere;
    left == kLanes ? store(grad + at, value) : store_part(grad + at, value, left);
  }
}

template <bool has_offset, typename T>
void gradient_of(const T* x, const T* weight, T* grad, int64_t rows, int64_t classes, const float* maximum,
                 const float* factor, const float* offset, const int64_t* target, const float* at_target) {
  if (classes <= kMostLaneClasses) {
    Place places[kLanes];
    place(places, classes);
    for (int64_t i = 0; i < rows; i += kLanes) {
      gradient_of_rows<has_offset>(x + i * classes, weight, grad + i * classes, min(rows - i, kLanes), classes, places,
                                   maximum + i, factor + i, has_offset ? offset + i : offset, target + i,
                                   at_target + i);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      gradient_of_row<has_offset>(x + i * classes, weight, grad + i * classes, classes, maximum[i], factor[i],
                                  has_offset ? offset[i] : 0, target[i], at_target[i]);
    }
  }
}

template <typename T>
void gradient(const T* x, const T* weight, T* grad, int64_t rows, int64_t classes, const float* maximum,
              const float* factor, const float* offset, const int64_t* target, const float* at_target) {
  const auto of = offset ? gradient_of<true, T> : gradient_of<false, T>;
  of(x, weight, grad, rows, classes, maximum, factor, offset, target, at_target);
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

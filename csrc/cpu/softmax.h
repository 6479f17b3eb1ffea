// The parts of softmax cross-entropy that visit every logit. For level.h.
#pragma once

#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// Up to so many classes, the rows and not the classes of a row lie in the lanes.
constexpr int64_t kMostLaneClasses = kLanes;

// The first count of kLanes labels as lanes, -1 in the others.
TORCH_MLP_INLINE vec_int load_labels(const int64_t* label, int64_t count) {
  int64_t values[kLanes];
  if (count < kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      values[l] = l < count ? label[l] : -1;
    }
    label = values;
  }
  vec_long halves[2];
  memcpy(halves, label, sizeof(halves));
  const vec_half_int parts[2] = {__builtin_convertvector(halves[0], vec_half_int),
                                 __builtin_convertvector(halves[1], vec_half_int)};
  vec_int lanes;
  memcpy(&lanes, parts, sizeof(lanes));
  return lanes;
}

// The statistics of kLanes rows (or count of them, the last rows) of at most kLanes classes.
template <bool is_whole, typename T>
TORCH_MLP_INLINE void statistics_of_rows(const T* x, const int64_t* label, int64_t count, int64_t classes,
                                         float* maximum, float* sum, float* at_label) {
  vec square[kLanes];
  TORCH_MLP_UNROLL
  for (int l = 0; l < kLanes; ++l) {
    square[l] = is_whole || l < count ? load_part(x + l * classes, classes) : vec{};
  }
  transpose(square);
  const vec_int of_label = load_labels(label, is_whole ? kLanes : count);
  vec most = square[0], at = square[0];
  TORCH_MLP_UNROLL
  for (int c = 1; c < kLanes; ++c) {
    if (c < classes) {
      most = maximum_of(square[c], most);
      at = of_label == c ? square[c] : at;
    }
  }
  vec total{};
  TORCH_MLP_UNROLL
  for (int c = 0; c < kLanes; ++c) {
    if (c < classes) {
      total += exp_below_overflow(square[c] - most);
    }
  }
  store_some<is_whole>(maximum, most, count);
  store_some<is_whole>(sum, total, count);
  store_some<is_whole>(at_label, at, count);
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
void statistics(const T* x, const int64_t* label, int64_t rows, int64_t classes, float* maximum, float* sum,
                float* at_label) {
  if (classes <= kMostLaneClasses) {
    const int64_t whole = whole_vectors(rows);
    for (int64_t i = 0; i < whole; i += kLanes) {
      statistics_of_rows<true>(x + i * classes, label + i, kLanes, classes, maximum + i, sum + i, at_label + i);
    }
    if (whole < rows) {
      statistics_of_rows<false>(x + whole * classes, label + whole, rows - whole, classes, maximum + whole, sum + whole,
                                at_label + whole);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      statistics_of_row(x + i * classes, classes, maximum[i], sum[i]);
      at_label[i] = to_float(x[i * classes + max(label[i], 0)]);
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
                                      float factor, float offset, int64_t label, float at_label) {
  const int64_t whole = whole_vectors(classes);
  // Before the rest, for grad may be x.
  const vec of_label = gradient_of_vector<false, false>(x + label, weight, 1, maximum, factor, offset) - at_label;
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
  store_part(grad + label, of_label, 1);
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

// numerator / sum, rounded once.
TORCH_MLP_INLINE vec quotient(const double* numerator, vec sum) {
  vec_double halves[2], sums[2];
  memcpy(halves, numerator, sizeof(halves));
  to_double(sum, sums);
  halves[0] /= sums[0];
  halves[1] /= sums[1];
  return to_float(halves);
}

// kLanes rows (or count of them, the last rows) of at most kLanes classes: vectors of adjacent elements, whatever rows
// they belong to, for which the values of each row are brought to its lanes.
template <bool has_offset, bool is_whole, typename T>
TORCH_MLP_INLINE void gradient_of_rows(const T* x, const T* weight, T* grad, int64_t count, int64_t classes,
                                       const Place* places, const float* maximum, const float* sum,
                                       const double* numerator, const float* offset, const int64_t* label,
                                       const float* at_label) {
  const auto of_rows = [&](const float* values) { return load_some<is_whole>(values, count); };
  double numerators[kLanes] = {};
  if (!is_whole) {
    memcpy(numerators, numerator, count * sizeof(double));
    numerator = numerators;
  }
  const vec of_maximum = of_rows(maximum), of_factor = quotient(numerator, of_rows(sum));
  const vec of_at_label = of_rows(at_label), of_offset = has_offset ? of_rows(offset) : vec{};
  const vec of_weight = has_offset && weight ? load_part(weight, classes) : broadcast(1.0f);
  const vec_int of_label = load_labels(label, is_whole ? kLanes : count);
  const int64_t elements = (is_whole ? kLanes : count) * classes;
  for (int64_t at = 0; at < elements; at += kLanes) {
    const auto [row, of_class] = places[at / kLanes];
    const int64_t left = min(elements - at, kLanes);
    const vec of_x = is_whole || left == kLanes ? load(x + at) : load_part(x + at, left);
    const vec of_softmax = permute(of_factor, row) * exp_below_overflow(of_x - permute(of_maximum, row));
    const vec elsewhere = has_offset ? of_softmax - permute(of_offset, row) * permute(of_weight, of_class) : of_softmax;
    const vec value = of_class == permute(of_label, row) ? of_softmax - permute(of_at_label, row) : elsewhere;
    is_whole || left == kLanes ? store(grad + at, value) : store_part(grad + at, value, left);
  }
}

bool some_are_negative(const int64_t* label, int64_t count) {
  int64_t all = 0;
  for (int64_t i = 0; i < count; ++i) {
    all |= label[i];
  }
  return all < 0;
}

// Rows that do not count hold anything, and get 0.
template <typename T>
void clear_rows(T* grad, int64_t rows, int64_t classes, const int64_t* label) {
  for (int64_t i = 0; i < rows; ++i) {
    if (label[i] < 0) {
      memset(grad + i * classes, 0, classes * sizeof(T));
    }
  }
}

template <bool has_offset, typename T>
void gradient_of(const T* x, const T* weight, T* grad, int64_t rows, int64_t classes, const float* maximum,
                 const float* sum, const double* numerator, const float* offset, const int64_t* label,
                 const float* at_label) {
  if (classes <= kMostLaneClasses) {
    Place places[kLanes];
    place(places, classes);
    const int64_t whole = whole_vectors(rows);
    const auto of_rows = [&](int64_t i, int64_t count, auto is_whole) {
      gradient_of_rows<has_offset, is_whole.value>(x + i * classes, weight, grad + i * classes, count, classes, places,
                                                   maximum + i, sum + i, numerator + i,
                                                   has_offset ? offset + i : offset, label + i, at_label + i);
    };
    for (int64_t i = 0; i < whole; i += kLanes) {
      of_rows(i, kLanes, std::true_type{});
    }
    if (whole < rows) {
      of_rows(whole, rows - whole, std::false_type{});
    }
    if (some_are_negative(label, rows)) {
      clear_rows(grad, rows, classes, label);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      if (label[i] < 0) {
        clear_rows(grad + i * classes, 1, classes, label + i);
      } else {
        gradient_of_row<has_offset>(x + i * classes, weight, grad + i * classes, classes, maximum[i],
                                    float(numerator[i] / double(sum[i])), has_offset ? offset[i] : 0, label[i],
                                    at_label[i]);
      }
    }
  }
}

template <typename T>
void gradient(const T* x, const T* weight, T* grad, int64_t rows, int64_t classes, const float* maximum,
              const float* sum, const double* numerator, const float* offset, const int64_t* label,
              const float* at_label) {
  const auto of = offset ? gradient_of<true, T> : gradient_of<false, T>;
  of(x, weight, grad, rows, classes, maximum, sum, numerator, offset, label, at_label);
}

// --- the work on every row ---

LabelCounts labels(const int64_t* target, int64_t count, int64_t classes, int64_t ignore_index, int64_t* label) {
  using vec_ulong = uint64_t __attribute__((vector_size(sizeof(vec_long))));
  vec_long kept{}, wrong{};
  for (int64_t i = 0; i < count; i += kHalfLanes) {
    const int64_t left = min(count - i, kHalfLanes);
    vec_long value = vec_long{} + ignore_index;  // in the lanes that are left
    if (left == kHalfLanes) {
      memcpy(&value, target + i, sizeof(value));
    } else {
      memcpy(&value, target + i, left * sizeof(int64_t));
    }
    const vec_long is_ignored = value == ignore_index, is_class = (vec_ulong)value < uint64_t(classes);
    const vec_long is_kept = is_class & ~is_ignored;
    kept -= is_kept;  // a lane that holds is -1
    wrong -= ~(is_class | is_ignored);
    const vec_long result = value | ~is_kept;
    if (left == kHalfLanes) {
      memcpy(label + i, &result, sizeof(result));
    } else {
      memcpy(label + i, &result, left * sizeof(int64_t));
    }
  }
  LabelCounts counts{};
  for (int l = 0; l < kHalfLanes; ++l) {
    counts.classes += kept[l];
    counts.wrong += wrong[l];
  }
  return counts;
}

// The values of at most kLanes rows, with a whole vector's room for each.
TORCH_MLP_INLINE void losses_of_rows(vec maximum, vec sum, vec at_label, const vec_long* label, float* log_sum,
                                     vec_double* loss) {
  const vec log_of_sum = log(sum);
  store(log_sum, log_of_sum);
  vec_double logs[2], maxima[2], at_labels[2];
  to_double(log_of_sum, logs);
  to_double(maximum, maxima);
  to_double(at_label, at_labels);
  TORCH_MLP_UNROLL
  for (int half = 0; half < 2; ++half) {
    loss[half] = label[half] < 0 ? vec_double{} : logs[half] + (maxima[half] - at_labels[half]);
  }
}

void losses(const float* maximum, const float* sum, const float* at_label, const int64_t* label, int64_t count,
            float* log_sum, double* loss) {
  const int64_t whole = whole_vectors(count), left = count - whole;
  vec_long of_label[2];
  vec_double of_loss[2];
  for (int64_t i = 0; i < whole; i += kLanes) {
    memcpy(of_label, label + i, sizeof(of_label));
    losses_of_rows(load(maximum + i), load(sum + i), load(at_label + i), of_label, log_sum + i, of_loss);
    memcpy(loss + i, of_loss, sizeof(of_loss));
  }
  if (left) {
    float logs[kLanes];
    memcpy(of_label, label + whole, left * sizeof(int64_t));
    losses_of_rows(load_part(maximum + whole, left), load_part(sum + whole, left), load_part(at_label + whole, left),
                   of_label, logs, of_loss);
    memcpy(log_sum + whole, logs, left * sizeof(float));
    memcpy(loss + whole, of_loss, left * sizeof(double));
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

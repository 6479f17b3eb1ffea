// The parts of softmax cross-entropy that visit every logit; those of few classes are in softmax_lanes.h. For level.h.
#pragma once

#include "softmax_lanes.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

template <typename T>
TORCH_MLP_INLINE float maximum_of_row(const T* x, int64_t classes) {
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
  return maximum_of(maximum_of(maximum_of(most[0], most[1]), maximum_of(most[2], most[3])));
}

// The sum of exp(x - maximum), which where keeps is true goes to exponentials; that may be x.
template <bool keeps, typename T>
TORCH_MLP_INLINE float exponentials_of_row(const T* x, int64_t classes, Next<T> next, float maximum,
                                           float* exponentials) {
  constexpr int vectors = 4;  // in flight at once
  const int64_t whole = whole_vectors(classes), unrolled = whole / (vectors * kLanes) * (vectors * kLanes);
  const auto keep = [&](int64_t c, vec value, int64_t count) {
    if constexpr (keeps) {
      count == kLanes ? store(exponentials + c, value) : store_part(exponentials + c, value, count);
    }
  };
  // In float for some of them: with all, the rounding of so many additions would be that of the sum.
  constexpr int64_t in_float = 16 * vectors * kLanes;
  DoubleSum of_lanes;
  int64_t c = 0;
  while (c < unrolled) {
    const int64_t end = min(unrolled, c + in_float);
    vec total[vectors] = {}, value[vectors];
    for (; c < end; c += vectors * kLanes) {
      TORCH_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        value[j] = load(x + c + j * kLanes) - maximum;
        next.fetch(c + j * kLanes);
      }
      exp_below_overflow(value);
      TORCH_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        keep(c + j * kLanes, value[j], kLanes);
        total[j] += value[j];
      }
    }
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      of_lanes.add(total[j]);
    }
  }
  for (; c < whole; c += kLanes) {
    const vec one = exp_below_overflow(load(x + c) - maximum);
    keep(c, one, kLanes);
    of_lanes.add(one);
  }
  if (c < classes) {
    const vec one = exp_below_overflow(load_part(x + c, classes - c) - maximum);
    keep(c, one, classes - c);
    of_lanes.add(first_lanes(one, classes - c, vec{}));
  }
  return float(of_lanes.total());
}

// The statistics of rows of many classes, and where keeps is true their exponentials.
template <bool keeps, typename T>
TORCH_MLP_INLINE void statistics_of_many(const T* x, const int64_t* label, int64_t rows, int64_t classes, Next<T> next,
                                         float* exponentials, float* maximum, float* sum, float* at_label) {
  for (int64_t i = 0; i < rows; ++i) {
    maximum[i] = maximum_of_row(x + i * classes, classes);
    at_label[i] = to_float(x[i * classes + max(label[i], 0)]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    sum[i] = exponentials_of_row<keeps, T>(x + i * classes, classes, next.from(i * classes), maximum[i],
                                           keeps ? exponentials + i * classes : nullptr);
  }
}

// How many rows of many classes take one step before the next.
TORCH_MLP_INLINE int64_t rows_together(int64_t classes) { return max(1, kElementsTogether / classes); }

// A maximum of -inf or NaN makes every exp NaN, as it should: softmax has no value there.
template <typename T>
void statistics(const T* x, const int64_t* label, int64_t rows, int64_t classes, float* maximum, float* sum,
                float* at_label) {
  if (classes <= kMostLaneClasses) {
    return statistics_in_lanes(x, label, rows, classes, maximum, sum, at_label);
  }
  const int64_t together = rows_together(classes);
  for (int64_t i = 0; i < rows; i += together) {
    const int64_t count = min(rows - i, together);
    const auto next = Next<T>::after(x + i * classes, nullptr, count * classes);
    statistics_of_many<false>(x + i * classes, label + i, count, classes, next, nullptr, maximum + i, sum + i,
                              at_label + i);
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

// What the elements of x are in the gradient of a row.
enum class Values { Logits, Exponentials };

template <Values values, bool has_offset, bool is_whole, typename T>
TORCH_MLP_INLINE vec gradient_of_vector(const T* x, const T* weight, int64_t count, float maximum, float factor,
                                        float offset) {
  const vec of_x = load_some<is_whole>(x, count);
  const vec value = factor * (values == Values::Logits ? exp_below_overflow(of_x - maximum) : of_x);
  return has_offset ? value - offset * (weight ? load_some<is_whole>(weight, count) : broadcast(1.0f)) : value;
}

template <Values values, bool has_offset, typename T>
TORCH_MLP_INLINE void gradient_of_row(const T* x, const T* weight, T* grad, int64_t classes, float maximum,
                                      float factor, float offset, int64_t label, float at_label) {
  const int64_t whole = whole_vectors(classes);
  // Before the rest, for grad may be x.
  const vec of_label =
      gradient_of_vector<values, false, false>(x + label, weight, 1, maximum, factor, offset) - at_label;
  for (int64_t c = 0; c < whole; c += kLanes) {
    store(grad + c, gradient_of_vector<values, has_offset, true>(x + c, weight ? weight + c : weight, kLanes, maximum,
                                                                 factor, offset));
  }
  if (whole < classes) {
    const int64_t left = classes - whole;
    store_part(grad + whole,
               gradient_of_vector<values, has_offset, false>(x + whole, weight ? weight + whole : weight, left, maximum,
                                                             factor, offset),
               left);
  }
  store_part(grad + label, of_label, 1);
}

template <Values values, bool has_offset, typename T>
TORCH_MLP_INLINE void gradient_of_row(const T* x, T* grad, int64_t classes, int64_t label, float maximum, float sum,
                                      const GradientTerms<T>& terms, int64_t i) {
  if (label < 0) {
    clear_rows(grad, 1, classes, &label);
  } else {
    gradient_of_row<values, has_offset>(x, terms.weight, grad, classes, maximum, terms.numerator[i] / sum,
                                        has_offset ? terms.offset[i] : 0, label, terms.at_label[i]);
  }
}

template <bool has_offset, typename T>
void gradient_of(const T* x, T* grad, int64_t rows, int64_t classes, const int64_t* label, const float* maximum,
                 const float* sum, const GradientTerms<T>& terms) {
  if (classes <= kMostLaneClasses) {
    return gradient_in_lanes<has_offset>(x, grad, rows, classes, label, maximum, sum, terms);
  }
  for (int64_t i = 0; i < rows; ++i) {
    gradient_of_row<Values::Logits, has_offset>(x + i * classes, grad + i * classes, classes, label[i], maximum[i],
                                                sum[i], terms, i);
  }
}

template <typename T>
void gradient(const T* x, T* grad, int64_t rows, int64_t classes, const int64_t* label, const float* maximum,
              const float* sum, const GradientTerms<T>& terms) {
  const auto of = terms.offset ? gradient_of<true, T> : gradient_of<false, T>;
  of(x, grad, rows, classes, label, maximum, sum, terms);
}

template <bool has_offset, typename T>
void statistics_and_gradient_of(const T* x, T* grad, int64_t rows, int64_t classes, const int64_t* label,
                                const GradientTerms<T>& terms, float* maximum, float* sum, float* at_label) {
  if (classes <= kMostLaneClasses) {
    return statistics_and_gradient_in_lanes<has_offset>(x, grad, rows, classes, label, terms, maximum, sum, at_label);
  }
  constexpr bool keeps = std::is_same_v<T, float>;  // exponentials of 16 bits would be too coarse
  constexpr Values values = keeps ? Values::Exponentials : Values::Logits;
  const int64_t together = rows_together(classes);
  for (int64_t begin = 0; begin < rows; begin += together) {
    const int64_t count = min(rows - begin, together), end = begin + count;
    const auto next = Next<T>::after(x + begin * classes, grad + begin * classes, count * classes);
    float* exponentials = nullptr;
    if constexpr (keeps) {
      exponentials = grad + begin * classes;
    }
    statistics_of_many<keeps>(x + begin * classes, label + begin, count, classes, next, exponentials, maximum + begin,
                              sum + begin, at_label + begin);
    for (int64_t i = begin; i < end; ++i) {
      gradient_of_row<values, has_offset>((keeps ? grad : x) + i * classes, grad + i * classes, classes, label[i],
                                          maximum[i], sum[i], terms, i);
    }
  }
}

template <typename T>
void statistics_and_gradient(const T* x, T* grad, int64_t rows, int64_t classes, const int64_t* label,
                             const GradientTerms<T>& terms, float* maximum, float* sum, float* at_label) {
  const auto of = terms.offset ? statistics_and_gradient_of<true, T> : statistics_and_gradient_of<false, T>;
  of(x, grad, rows, classes, label, terms, maximum, sum, at_label);
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

// The values of kLanes rows.
TORCH_MLP_INLINE void losses_of_rows(const float* maximum, const float* sum, const float* at_label,
                                     const int64_t* label, float* log_sum, double* loss) {
  const vec log_of_sum = log(load(sum));
  store(log_sum, log_of_sum);
  vec_double logs[2], maxima[2], at_labels[2];
  to_double(log_of_sum, logs);
  to_double(load(maximum), maxima);
  to_double(load(at_label), at_labels);
  TORCH_MLP_UNROLL
  for (int half = 0; half < 2; ++half) {
    vec_long of_label;
    memcpy(&of_label, label + half * kHalfLanes, sizeof(of_label));
    const vec_double value = of_label < 0 ? vec_double{} : logs[half] + (maxima[half] - at_labels[half]);
    memcpy(loss + half * kHalfLanes, &value, sizeof(value));
  }
}

void losses(const float* maximum, const float* sum, const float* at_label, const int64_t* label, int64_t count,
            float* log_sum, double* loss) {
  const int64_t whole = whole_vectors(count), left = count - whole;
  for (int64_t i = 0; i < whole; i += kLanes) {
    losses_of_rows(maximum + i, sum + i, at_label + i, label + i, log_sum + i, loss + i);
  }
  if (left) {
    float maxima[kLanes] = {}, sums[kLanes] = {}, at_labels[kLanes] = {}, logs[kLanes];
    int64_t labels[kLanes] = {};
    double of_loss[kLanes];
    memcpy(maxima, maximum + whole, left * sizeof(float));
    memcpy(sums, sum + whole, left * sizeof(float));
    memcpy(at_labels, at_label + whole, left * sizeof(float));
    memcpy(labels, label + whole, left * sizeof(int64_t));
    losses_of_rows(maxima, sums, at_labels, labels, logs, of_loss);
    memcpy(log_sum + whole, logs, left * sizeof(float));
    memcpy(loss + whole, of_loss, left * sizeof(double));
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

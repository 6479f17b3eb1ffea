// The parts of softmax cross-entropy that visit every logit. For level.h.
#pragma once

#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// Up to so many classes, the rows and not the classes of a row lie in the lanes.
constexpr int64_t kMostLaneClasses = kLanes;
// So many rows, or rows of so many logits, take one step before the next, in the first-level cache: the steps of one
// row wait for each other, and the processor does not look much further ahead than that row.
constexpr int64_t kRowsInLanes = 256;
constexpr int64_t kElementsTogether = 1 << 12;

// The logits that come next, and where their gradient will go if it is not null: fetched while the exponentials of the
// present ones are computed, which leaves the memory idle. Fetching what lies behind the last row does no harm.
template <typename T>
struct Next {
  const T* x;
  T* grad;

  // After so many elements, but no further away than caches hold.
  static TORCH_MLP_INLINE Next after(const T* x, T* grad, int64_t elements) {
    const int64_t away = min(elements, kElementsTogether);
    return {x + away, grad ? grad + away : nullptr};
  }

  TORCH_MLP_INLINE Next from(int64_t at) const { return {x + at, grad ? grad + at : nullptr}; }

  TORCH_MLP_INLINE void fetch(int64_t at) const {
    __builtin_prefetch(x + at);
    if (grad) {
      __builtin_prefetch(grad + at, 1);
    }
  }
};

// The lower halves of kLanes numbers of twice a lane's size.
template <size_t... lane>
TORCH_MLP_INLINE vec_int lower_halves(vec_int first, vec_int second, std::index_sequence<lane...>) {
  return TORCH_MLP_SHUFFLE(first, second, int(2 * lane)...);
}

// The first count of kLanes labels as lanes, -1 in the others.
TORCH_MLP_INLINE vec_int load_labels(const int64_t* label, int64_t count) {
  int64_t values[kLanes];
  if (count < kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      values[l] = l < count ? label[l] : -1;
    }
    label = values;
  }
  vec_int halves[2];
  memcpy(halves, label, sizeof(halves));
  return lower_halves(halves[0], halves[1], std::make_index_sequence<kLanes>{});
}

// kLanes rows (or count of them, the last rows) of at most kLanes classes, less their maxima: class c of all rows in
// shifted[c].
template <bool is_whole, typename T>
TORCH_MLP_INLINE void shift_rows(const T* x, const int64_t* label, int64_t count, int64_t classes, vec* shifted,
                                 float* maximum, float* at_label) {
  vec square[kLanes];
  TORCH_MLP_UNROLL
  for (int l = 0; l < kLanes; ++l) {
    square[l] = is_whole || l < count ? load_part(x + l * classes, classes) : vec{};
  }
  transpose(square);
  const vec_int of_label = load_labels(label, is_whole ? kLanes : count);
  vec most[2] = {square[0], square[0]}, at = square[0];
  TORCH_MLP_UNROLL
  for (int c = 1; c < kLanes; ++c) {
    if (c < classes) {
      most[c % 2] = maximum_of(square[c], most[c % 2]);
      at = of_label == c ? square[c] : at;
    }
  }
  const vec of_maximum = maximum_of(most[0], most[1]);
  TORCH_MLP_UNROLL
  for (int c = 0; c < kLanes; ++c) {
    if (c < classes) {
      shifted[c] = square[c] - of_maximum;
    }
  }
  store_some<is_whole>(maximum, of_maximum, count);
  store_some<is_whole>(at_label, at, count);
}

// Calls body(i, count, whether count is kLanes) for the rows from i on, kLanes or the last ones.
template <typename Body>
TORCH_MLP_INLINE void for_each_group(int64_t rows, const Body& body) {
  const int64_t whole = whole_vectors(rows);
  for (int64_t i = 0; i < whole; i += kLanes) {
    body(i, kLanes, std::true_type{});
  }
  if (whole < rows) {
    body(whole, rows - whole, std::false_type{});
  }
}

// The statistics of at most kRowsInLanes rows of few classes, and exp(x - maximum): class c of the rows from i on in
// exponentials[i / kLanes * classes + c].
template <typename T>
TORCH_MLP_INLINE void exponentials_of_rows(const T* x, const int64_t* label, int64_t rows, int64_t classes,
                                           Next<T> next, vec* exponentials, float* maximum, float* sum,
                                           float* at_label) {
  for_each_group(rows, [&](int64_t i, int64_t count, auto is_whole) {
    shift_rows<is_whole.value>(x + i * classes, label + i, count, classes, exponentials + i / kLanes * classes,
                               maximum + i, at_label + i);
  });
  for_each_group(rows, [&](int64_t i, int64_t count, auto is_whole) {
    vec* values = exponentials + i / kLanes * classes;
    vec total{};
    for (int64_t c = 0; c < classes; ++c) {
      next.fetch(i * classes + c * kLanes);
      values[c] = exp_below_overflow(values[c]);
      total += values[c];
    }
    store_some<is_whole.value>(sum + i, total, count);
  });
}

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
  vec total[vectors] = {}, value[vectors];
  int64_t c = 0;
  for (; c < unrolled; c += vectors * kLanes) {
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
  for (; c < whole; c += kLanes) {
    const vec one = exp_below_overflow(load(x + c) - maximum);
    keep(c, one, kLanes);
    total[0] += one;
  }
  if (c < classes) {
    const vec one = exp_below_overflow(load_part(x + c, classes - c) - maximum);
    keep(c, one, classes - c);
    total[1] += first_lanes(one, classes - c, vec{});
  }
  DoubleSum of_lanes;
  TORCH_MLP_UNROLL
  for (int j = 0; j < vectors; ++j) {
    of_lanes.add(total[j]);
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
                                           exponentials + i * classes);
  }
}

// How many rows take one step before the next.
TORCH_MLP_INLINE int64_t rows_together(int64_t classes) {
  return classes <= kMostLaneClasses ? kRowsInLanes : max(1, kElementsTogether / classes);
}

// A maximum of -inf or NaN makes every exp NaN, as it should: softmax has no value there.
template <typename T>
void statistics(const T* x, const int64_t* label, int64_t rows, int64_t classes, float* maximum, float* sum,
                float* at_label) {
  const int64_t together = rows_together(classes);
  vec exponentials[kRowsInLanes / kLanes * kMostLaneClasses];
  for (int64_t i = 0; i < rows; i += together) {
    const int64_t count = min(rows - i, together);
    const auto next = Next<T>::after(x + i * classes, nullptr, count * classes);
    if (classes <= kMostLaneClasses) {
      exponentials_of_rows(x + i * classes, label + i, count, classes, next, exponentials, maximum + i, sum + i,
                           at_label + i);
    } else {
      statistics_of_many<false>(x + i * classes, label + i, count, classes, next, nullptr, maximum + i, sum + i,
                                at_label + i);
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
template <bool has_offset, bool is_whole, typename T>
TORCH_MLP_INLINE void gradient_of_rows(const T* x, T* grad, int64_t count, int64_t classes, const Place* places,
                                       const int64_t* label, const float* maximum, const float* sum,
                                       const GradientTerms<T>& terms) {
  const auto of_rows = [&](const float* values) { return load_some<is_whole>(values, count); };
  const vec of_maximum = of_rows(maximum), of_factor = of_rows(terms.numerator) / of_rows(sum);
  const vec of_at_label = of_rows(terms.at_label), of_offset = has_offset ? of_rows(terms.offset) : vec{};
  const vec of_weight = has_offset && terms.weight ? load_part(terms.weight, classes) : broadcast(1.0f);
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

// The same from their exponentials, class c of all rows in exponentials[c].
template <bool has_offset, bool is_whole>
TORCH_MLP_INLINE void gradient_of_exponentials(const vec* exponentials, float* grad, int64_t count, int64_t classes,
                                               const int64_t* label, const float* sum,
                                               const GradientTerms<float>& terms) {
  const auto of_rows = [&](const float* values) { return load_some<is_whole>(values, count); };
  const vec of_factor = of_rows(terms.numerator) / of_rows(sum), of_at_label = of_rows(terms.at_label);
  const vec of_offset = has_offset ? of_rows(terms.offset) : vec{};
  const vec_int of_label = load_labels(label, is_whole ? kLanes : count);
  vec square[kLanes] = {};
  TORCH_MLP_UNROLL
  for (int c = 0; c < kLanes; ++c) {
    if (c < classes) {
      const vec of_softmax = of_factor * exponentials[c];
      const vec elsewhere = has_offset ? of_softmax - of_offset * (terms.weight ? terms.weight[c] : 1.0f) : of_softmax;
      square[c] = of_label == c ? of_softmax - of_at_label : elsewhere;
    }
  }
  transpose(square);
  TORCH_MLP_UNROLL
  for (int l = 0; l < kLanes; ++l) {
    if (is_whole || l < count) {
      store_part(grad + l * classes, square[l], classes);
    }
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
    Place places[kLanes];
    place(places, classes);
    for_each_group(rows, [&](int64_t i, int64_t count, auto is_whole) {
      gradient_of_rows<has_offset, is_whole.value>(x + i * classes, grad + i * classes, count, classes, places,
                                                   label + i, maximum + i, sum + i, terms.from(i));
    });
    if (some_are_negative(label, rows)) {
      clear_rows(grad, rows, classes, label);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      gradient_of_row<Values::Logits, has_offset>(x + i * classes, grad + i * classes, classes, label[i], maximum[i],
                                                  sum[i], terms, i);
    }
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
  const int64_t together = rows_together(classes);
  vec exponentials[kRowsInLanes / kLanes * kMostLaneClasses];
  for (int64_t begin = 0; begin < rows; begin += together, x += together * classes, grad += together * classes,
               label += together, maximum += together, sum += together, at_label += together) {
    const int64_t count = min(rows - begin, together);
    const GradientTerms<T> of_rows = terms.from(begin);
    const auto next = Next<T>::after(x, grad, count * classes);
    if constexpr (!std::is_same_v<T, float>) {  // exponentials of 16 bits would be too coarse
      statistics(x, label, count, classes, maximum, sum, at_label);
      gradient_of<has_offset>(x, grad, count, classes, label, maximum, sum, of_rows);
    } else if (classes <= kMostLaneClasses) {
      exponentials_of_rows(x, label, count, classes, next, exponentials, maximum, sum, at_label);
      for_each_group(count, [&](int64_t i, int64_t some, auto is_whole) {
        gradient_of_exponentials<has_offset, is_whole.value>(exponentials + i / kLanes * classes, grad + i * classes,
                                                             some, classes, label + i, sum + i, of_rows.from(i));
      });
      if (some_are_negative(label, count)) {
        clear_rows(grad, count, classes, label);
      }
    } else {
      statistics_of_many<true>(x, label, count, classes, next, grad, maximum, sum, at_label);
      for (int64_t i = 0; i < count; ++i) {
        gradient_of_row<Values::Exponentials, has_offset>(grad + i * classes, grad + i * classes, classes, label[i],
                                                          maximum[i], sum[i], of_rows, i);
      }
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

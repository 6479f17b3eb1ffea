// Softmax cross-entropy of few classes: rows, and not the classes of a row, lie in the lanes. For softmax.h.
//
// A column is one class of kLanes rows. Of kRowsInLanes rows at a time, all columns take one step before the next, in
// the first-level cache: logits are transposed, maxima taken, exponentials and their sums computed, gradients
// transposed back. The steps of a few rows wait for each other, and the processor does not look much further ahead.
#pragma once

#include "exp.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

constexpr int64_t kMostLaneClasses = 16;
constexpr int64_t kRowsInLanes = 256;
// Rows of so many logits take one step before the next where there are many classes: in softmax.h, as here.
constexpr int64_t kElementsTogether = 1 << 12;

// The logits that come next, and where their gradient will go, if anywhere and if that pays: fetched while the
// exponentials of the present ones are computed, which leaves the memory idle. Fetching what lies behind the last row
// does no harm.
template <typename T>
struct Next {
  const T* x;
  T* grad;

  // After so many elements, but no further away than caches hold.
  static TORCH_MLP_INLINE Next after(const T* x, T* grad, int64_t elements) {
    const int64_t away = min(elements, kElementsTogether);
    return {x + away, grad && tuning().fetches_gradient ? grad + away : nullptr};
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
  vec_int first, second;  // one by one, for both at once would come through memory
  memcpy(&first, label, sizeof(first));
  memcpy(&second, label + kHalfLanes, sizeof(second));
  return lower_halves(first, second, std::make_index_sequence<kLanes>{});
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

// Class c of the rows from i on in columns[i / kLanes * classes + c].
using Columns = vec[kRowsInLanes / kLanes * kMostLaneClasses];

template <typename T>
TORCH_MLP_INLINE void transpose_rows(const T* x, int64_t rows, int64_t classes, vec* columns) {
  for_each_group(rows, [&](int64_t i, int64_t count, auto is_whole) {
    for (int64_t c = 0; c < classes; c += kLanes) {
      const T* from = x + i * classes + c;
      vec* to = columns + i / kLanes * classes + c;
      const int64_t left = min(classes - c, kLanes);
      vec square[kLanes];
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        square[l] = is_whole.value || l < count ? load_part(from + l * classes, left) : vec{};
      }
      transpose(square);
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        if (l < left) {
          to[l] = square[l];
        }
      }
    }
  });
}

TORCH_MLP_INLINE void maxima(const vec* columns, const int64_t* label, int64_t rows, int64_t classes, float* maximum,
                             float* at_label) {
  for_each_group(rows, [&](int64_t i, int64_t count, auto is_whole) {
    const vec* column = columns + i / kLanes * classes;
    const vec_int of_label = load_labels(label + i, count);
    vec most = classes > 0 ? column[0] : vec{}, at = most;
    for (int64_t c = 1; c < classes; ++c) {
      most = maximum_of(column[c], most);
      at = of_label == int32_t(c) ? column[c] : at;
    }
    store_some<is_whole.value>(maximum + i, most, count);
    store_some<is_whole.value>(at_label + i, at, count);
  });
}

// Puts exp(x - maximum) in the place of x, and its sums to sum unless that is null.
template <typename T>
TORCH_MLP_INLINE void exponentials(vec* columns, int64_t rows, int64_t classes, const float* maximum, Next<T> next,
                                   float* sum) {
  for_each_group(rows, [&](int64_t i, int64_t count, auto is_whole) {
    vec* column = columns + i / kLanes * classes;
    const vec of_maximum = load_some<is_whole.value>(maximum + i, count);
    vec total{};
    for (int64_t c = 0; c < classes; ++c) {
      next.fetch(i * classes + c * kLanes);
      column[c] = exp_below_overflow(column[c] - of_maximum);
      total += column[c];
    }
    if (sum) {
      store_some<is_whole.value>(sum + i, total, count);
    }
  });
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

// Of columns of exponentials.
template <bool has_offset, typename T>
TORCH_MLP_INLINE void gradients(const vec* columns, T* grad, int64_t rows, int64_t classes, const int64_t* label,
                                const float* sum, const GradientTerms<T>& terms) {
  for_each_group(rows, [&](int64_t i, int64_t count, auto is_whole) {
    const auto of_rows = [&](const float* values) { return load_some<is_whole.value>(values + i, count); };
    const vec of_factor = of_rows(terms.numerator) / of_rows(sum), of_at_label = of_rows(terms.at_label);
    const vec of_offset = has_offset ? of_rows(terms.offset) : vec{};
    const vec_int of_label = load_labels(label + i, count);
    // Copies, for the compiler reads again after each store what a store may have changed.
    const vec* const column = columns + i / kLanes * classes;
    const T* const weight = terms.weight;
    T* const first_row = grad + i * classes;
    const int64_t stride = classes;
    // What a whole vector writes behind the end of its row is overwritten by the rows that follow, if those are enough
    // and the ends of the rows come before the rest.
    const bool may_spill = !kStoresPartsAtOnce && (rows - i - kLanes) * classes >= kLanes;
    const auto some_columns = [&](int64_t c, auto width) {
      const vec_int label_from_c = of_label - int32_t(c);
      vec square[kLanes] = {};
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        if (l < width) {
          const vec of_softmax = of_factor * column[c + l];
          const vec elsewhere =
              has_offset ? of_softmax - of_offset * (weight ? to_float(weight[c + l]) : 1.0f) : of_softmax;
          square[l] = label_from_c == l ? of_softmax - of_at_label : elsewhere;
        }
      }
      transpose(square);
      T* to = first_row + c;
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l, to += stride) {
        if (may_spill) {
          store(to, square[l]);
        } else if (is_whole.value || l < count) {
          store_part(to, square[l], width);
        }
      }
    };
    const int64_t whole = whole_vectors(classes);
    if (whole < classes) {
      some_columns(whole, classes - whole);
    }
    for (int64_t c = 0; c < whole; c += kLanes) {
      some_columns(c, std::integral_constant<int64_t, kLanes>{});
    }
  });
  if (some_are_negative(label, rows)) {
    clear_rows(grad, rows, classes, label);
  }
}

// --- the kernels, see kernels.h ---

template <typename T>
void statistics_in_lanes(const T* x, const int64_t* label, int64_t rows, int64_t classes, float* maximum, float* sum,
                         float* at_label) {
  Columns columns;
  for (int64_t i = 0; i < rows; i += kRowsInLanes) {
    const int64_t count = min(rows - i, kRowsInLanes);
    transpose_rows(x + i * classes, count, classes, columns);
    maxima(columns, label + i, count, classes, maximum + i, at_label + i);
    exponentials(columns, count, classes, maximum + i, Next<T>::after(x + i * classes, nullptr, count * classes),
                 sum + i);
  }
}

template <bool has_offset, typename T>
void gradient_in_lanes(const T* x, T* grad, int64_t rows, int64_t classes, const int64_t* label, const float* maximum,
                       const float* sum, const GradientTerms<T>& terms) {
  Columns columns;
  for (int64_t i = 0; i < rows; i += kRowsInLanes) {
    const int64_t count = min(rows - i, kRowsInLanes);
    transpose_rows(x + i * classes, count, classes, columns);
    exponentials(columns, count, classes, maximum + i,
                 Next<T>::after(x + i * classes, grad + i * classes, count * classes), nullptr);
    gradients<has_offset>(columns, grad + i * classes, count, classes, label + i, sum + i, terms.from(i));
  }
}

template <bool has_offset, typename T>
void statistics_and_gradient_in_lanes(const T* x, T* grad, int64_t rows, int64_t classes, const int64_t* label,
                                      const GradientTerms<T>& terms, float* maximum, float* sum, float* at_label) {
  Columns columns;
  for (int64_t i = 0; i < rows; i += kRowsInLanes) {
    const int64_t count = min(rows - i, kRowsInLanes);
    transpose_rows(x + i * classes, count, classes, columns);
    maxima(columns, label + i, count, classes, maximum + i, at_label + i);
    exponentials(columns, count, classes, maximum + i,
                 Next<T>::after(x + i * classes, grad + i * classes, count * classes), sum + i);
    gradients<has_offset>(columns, grad + i * classes, count, classes, label + i, sum + i, terms.from(i));
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

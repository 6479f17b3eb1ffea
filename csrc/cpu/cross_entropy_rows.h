// The work of the softmax cross-entropy ops on the CPU, on contiguous rows of logits in memory: what cross_entropy.cpp
// and linear_cross_entropy.cpp are made of. The formulas are there.
//
// What visits every logit is in softmax.h, for float and bfloat16; the other dtypes take plain loops. Threads: by
// blocks of rows. The loss is summed per block, then over the blocks; their number depends on the shape alone, so that
// the bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "../tensor.h"
#include "dtypes.h"
#include "scratch.h"

namespace torch_mlp {
namespace {

constexpr int64_t kElementsPerThread = 1 << 16;  // exponentials that pay for waking a thread: 25 us
constexpr int64_t kMaxSumBlocks = 64;            // of rows whose losses are summed
constexpr int64_t kRowsAtOnce = 256;             // whose statistics stay in the first-level cache
constexpr int64_t kElementsAtOnce = 1 << 16;     // logits that stay in the second-level cache

struct Options {
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing;
};

// Over some rows: their losses, the weights of their targets, and how many targets are wrong.
struct RowSums {
  double loss = 0, weight = 0;
  int64_t wrong = 0;

  RowSums operator+(const RowSums& other) const {
    return {loss + other.loss, weight + other.weight, wrong + other.wrong};
  }
};

// What comes in for the backward pass: a factor for all rows, or one for each; and, or null, one for the lse of each.
template <typename grad_t, typename compute>
struct RowGradients {
  double of_all;
  const grad_t* of_rows;
  int64_t stride;
  const compute* of_lse;

  // Those of the rows from begin on.
  RowGradients from(int64_t begin) const {
    return {of_all, of_rows ? of_rows + begin * stride : nullptr, stride, of_lse ? of_lse + begin : nullptr};
  }
};

template <typename grad_t, typename compute>
RowGradients<grad_t, compute> row_gradients(const Tensor& grad_output, const std::optional<Tensor>& grad_lse,
                                            double total_weight, Reduction reduction) {
  const grad_t* grad = grad_output.const_data_ptr<grad_t>();
  const compute* of_lse = grad_lse ? grad_lse->const_data_ptr<compute>() : nullptr;
  if (reduction == Reduction::None) {
    return {0, grad, grad_output.stride(0), of_lse};
  }
  return {reduction == Reduction::Mean ? double(*grad) / total_weight : double(*grad), nullptr, 0, of_lse};
}

// A tensor of this size comes fresh from the system each time, page by page. With large pages it comes in a third of
// the time.
constexpr size_t kFreshBytes = 2 << 20;

inline Tensor empty_in_large_pages(const std::vector<int64_t>& sizes, const Tensor& like) {
  Tensor result = empty(sizes, like.scalar_type(), like);
  if (const size_t bytes = size_t(result.numel()) * result.element_size(); bytes >= kFreshBytes) {
    prefer_large_pages(result.mutable_data_ptr(), bytes);
  }
  return result;
}

// The labels are read where they are used, in parallel regions, whose exceptions lose their type: this is called
// afterwards, and results that would be wrong never leave the op.
inline void check_labels(const char* op, bool are_right, const int64_t* target, int64_t rows, int64_t classes,
                         int64_t ignore_index) {
  if (!are_right) {
    const auto is_wrong = [=](int64_t label) { return uint64_t(label) >= uint64_t(classes) && label != ignore_index; };
    const int64_t* wrong = std::find_if(target, target + rows, is_wrong);
    check<std::out_of_range>(false, op, ": expected target in [0, ", classes, ") or ignore_index ", ignore_index,
                             ", got ", *wrong, " at position ", wrong - target);
  }
}

template <typename scalar_t>
double sum_of_weights(const scalar_t* weight, int64_t classes) {
  return weight ? std::accumulate(weight, weight + classes, 0.0,
                                  [](double sum, scalar_t value) { return sum + double(value); })
                : double(classes);
}

// --- the work on every logit: as in kernels.h, whose kernels know float and bfloat16; plain loops for the others ---

template <typename scalar_t>
void statistics(const scalar_t* x, const int64_t* label, int64_t rows, int64_t classes, compute_t<scalar_t>* maximum,
                compute_t<scalar_t>* sum, compute_t<scalar_t>* at_label) {
  using compute = compute_t<scalar_t>;
  if constexpr (has_vector_kernels<scalar_t>) {
    softmax_kernels<scalar_t>().statistics(bits_of(x), label, rows, classes, maximum, sum, at_label);
  } else {
    for (int64_t i = 0; i < rows; ++i, x += classes) {
      compute most = -std::numeric_limits<compute>::infinity();
      for (int64_t c = 0; c < classes; ++c) {
        most = std::max(most, compute(x[c]));
      }
      double total = 0;
      for (int64_t c = 0; c < classes; ++c) {
        total += std::exp(compute(x[c]) - most);
      }
      maximum[i] = most;
      sum[i] = compute(total);
      at_label[i] = label[i] < 0 ? compute(0) : compute(x[label[i]]);
    }
  }
}

template <typename scalar_t>
double deficit(const scalar_t* x, const scalar_t* weight, int64_t classes, compute_t<scalar_t> maximum) {
  if constexpr (has_vector_kernels<scalar_t>) {
    return softmax_kernels<scalar_t>().deficit(bits_of(x), bits_of(weight), classes, maximum);
  } else {
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) {
      sum += (weight ? double(weight[c]) : 1.0) * (double(maximum) - double(x[c]));
    }
    return sum;
  }
}

template <typename scalar_t>
using TermsOf = GradientTerms<scalar_t, compute_t<scalar_t>>;

template <typename scalar_t>
auto terms_of_bits(const TermsOf<scalar_t>& terms) {
  using bits_t = std::remove_const_t<std::remove_pointer_t<decltype(bits_of(terms.weight))>>;
  return GradientTerms<bits_t>{bits_of(terms.weight), terms.numerator, terms.offset, terms.at_label};
}

template <typename scalar_t>
void gradient(const scalar_t* x, scalar_t* grad, int64_t rows, int64_t classes, const int64_t* label,
              const compute_t<scalar_t>* maximum, const compute_t<scalar_t>* sum, const TermsOf<scalar_t>& terms) {
  using compute = compute_t<scalar_t>;
  if constexpr (has_vector_kernels<scalar_t>) {
    softmax_kernels<scalar_t>().gradient(bits_of(x), bits_of(grad), rows, classes, label, maximum, sum,
                                         terms_of_bits<scalar_t>(terms));
  } else {
    for (int64_t i = 0; i < rows; ++i, x += classes, grad += classes) {
      const compute factor = terms.numerator[i] / sum[i], offset = terms.offset ? terms.offset[i] : compute(0);
      for (int64_t c = 0; c < classes; ++c) {
        const compute elsewhere = offset * (terms.weight ? compute(terms.weight[c]) : compute(1));
        const compute value =
            factor * std::exp(compute(x[c]) - maximum[i]) - (c == label[i] ? terms.at_label[i] : elsewhere);
        grad[c] = scalar_t(label[i] < 0 ? compute(0) : value);
      }
    }
  }
}

template <typename scalar_t>
void statistics_and_gradient(const scalar_t* x, scalar_t* grad, int64_t rows, int64_t classes, const int64_t* label,
                             const TermsOf<scalar_t>& terms, compute_t<scalar_t>* maximum, compute_t<scalar_t>* sum,
                             compute_t<scalar_t>* at_label) {
  if constexpr (has_vector_kernels<scalar_t>) {
    softmax_kernels<scalar_t>().statistics_and_gradient(bits_of(x), bits_of(grad), rows, classes, label,
                                                        terms_of_bits<scalar_t>(terms), maximum, sum, at_label);
  } else {
    statistics(x, label, rows, classes, maximum, sum, at_label);
    gradient(x, grad, rows, classes, label, maximum, sum, terms);
  }
}

// --- the work on every row ---

template <typename compute>
void losses(const compute* maximum, const compute* sum, const compute* at_label, const int64_t* label, int64_t count,
            compute* log_sum, double* loss) {
  if constexpr (std::is_same_v<compute, float>) {
    kernels().losses(maximum, sum, at_label, label, count, log_sum, loss);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      log_sum[i] = std::log(sum[i]);
      loss[i] = label[i] < 0 ? 0 : double(log_sum[i]) + (double(maximum[i]) - double(at_label[i]));
    }
  }
}

// In four parts, whose additions need not wait for each other.
double sum_of(const double* values, int64_t count) {
  double parts[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t part = 0; part < 4; ++part) {
      parts[part] += values[i + part];
    }
  }
  for (; i < count; ++i) {
    parts[0] += values[i];
  }
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// The terms of the gradients of at most kRowsAtOnce rows.
template <typename scalar_t, typename grad_t>
class RowTerms {
 public:
  using compute = compute_t<scalar_t>;

  RowTerms(const RowGradients<grad_t, compute>& incoming, const scalar_t* weight, double weight_sum, int64_t rows,
           int64_t classes, double label_smoothing)
      : incoming_(incoming),
        weight_(weight),
        weight_sum_(weight_sum),
        confidence_(1 - label_smoothing),
        smoothing_(label_smoothing / double(classes)),
        are_alike_(!incoming.of_rows && !incoming.of_lse && !weight) {
    for (int64_t k = 0; are_alike_ && k < std::min(kRowsAtOnce, rows); ++k) {
      set(k, incoming.of_all, 1, 0);
    }
  }

  // Those of the rows from begin on.
  TermsOf<scalar_t> of(int64_t begin, int64_t count, const int64_t* label) {
    for (int64_t k = 0; !are_alike_ && k < count; ++k) {
      const int64_t i = begin + k;
      set(k, incoming_.of_rows ? double(incoming_.of_rows[i * incoming_.stride]) : incoming_.of_all,
          weight_ && label[k] >= 0 ? double(weight_[label[k]]) : 1.0,
          incoming_.of_lse ? double(incoming_.of_lse[i]) : 0.0);
    }
    return {weight_, numerator_.data(), smoothing_ == 0 ? nullptr : offset_.data(), at_label_.data()};
  }

 private:
  void set(int64_t k, double scale, double target_weight, double of_lse) {
    const double row_weight = confidence_ * target_weight;
    numerator_[k] = compute(scale * (row_weight + smoothing_ * weight_sum_) + of_lse);
    offset_[k] = compute(scale * smoothing_);
    // The sum of both: one class alone must get exactly 0.
    at_label_[k] = compute(scale * (row_weight + smoothing_ * target_weight));
  }

  const RowGradients<grad_t, compute>& incoming_;
  const scalar_t* weight_;
  const double weight_sum_, confidence_, smoothing_;
  const bool are_alike_;
  std::array<compute, kRowsAtOnce> numerator_, offset_, at_label_;
};

// How many rows are visited together, so that they stay in cache from one visit to the next: a multiple of those that
// vectors and the kernels' own steps hold, where there are so many.
inline int64_t rows_at_once(int64_t classes) {
  constexpr int64_t multiple = 16;
  return std::clamp<int64_t>(kElementsAtOnce / std::max<int64_t>(1, classes) / multiple * multiple, 1, kRowsAtOnce);
}

// By what the mean is divided.
template <typename scalar_t>
double total_weight_of(const int64_t* target, const scalar_t* weight, int64_t rows, int64_t classes,
                       int64_t ignore_index) {
  std::array<int64_t, kRowsAtOnce> label;
  double total = 0;
  for (int64_t i = 0; i < rows; i += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, rows - i);
    const int64_t kept = kernels().labels(target + i, count, classes, ignore_index, label.data()).classes;
    total += !weight ? double(kept)
                     : std::accumulate(label.begin(), label.begin() + count, 0.0,
                                       [&](double sum, int64_t c) { return c < 0 ? sum : sum + double(weight[c]); });
  }
  return total;
}

// Writes each row's maximum and sum, its loss unless that is null, and unless grad_input is null the gradient of the
// logits by the sum of the losses times scale; it may take the place of the logits.
template <typename scalar_t, typename loss_t>
RowSums cross_entropy_rows(const scalar_t* input, const int64_t* target, const scalar_t* weight, loss_t* loss,
                           compute_t<scalar_t>* maximum, compute_t<scalar_t>* sum, scalar_t* grad_input, double scale,
                           int64_t rows, int64_t classes, const Options& options) {
  using compute = compute_t<scalar_t>;
  const double confidence = 1 - options.label_smoothing, smoothing = options.label_smoothing / double(classes);
  const double weight_sum = sum_of_weights(weight, classes);
  const int64_t at_once = rows_at_once(classes),
                block_rows = ceil_div(ceil_div(rows, kMaxSumBlocks), at_once) * at_once;
  const int64_t blocks = rows > 0 ? ceil_div(rows, block_rows) : 0;
  const RowGradients<compute, compute> incoming{scale, nullptr, 0, nullptr};
  std::array<RowSums, kMaxSumBlocks> of_blocks{};

  const auto rows_between = [&](int64_t begin, int64_t end, RowTerms<scalar_t, compute>& terms) {
    const int64_t count = end - begin;
    const scalar_t* x = input + begin * classes;
    scalar_t* grad = grad_input ? grad_input + begin * classes : nullptr;
    std::array<int64_t, kRowsAtOnce> label;
    std::array<compute, kRowsAtOnce> at_label, log_sum;
    std::array<double, kRowsAtOnce> row_loss;
    const LabelCounts counts = kernels().labels(target + begin, count, classes, options.ignore_index, label.data());
    // The deficit is computed of logits, whose place their gradient may have taken.
    const bool is_one_visit = grad_input && (smoothing == 0 || grad_input != input);
    if (is_one_visit) {
      statistics_and_gradient(x, grad, count, classes, label.data(), terms.of(begin, count, label.data()),
                              maximum + begin, sum + begin, at_label.data());
    } else {
      statistics(x, label.data(), count, classes, maximum + begin, sum + begin, at_label.data());
    }
    losses(maximum + begin, sum + begin, at_label.data(), label.data(), count, log_sum.data(), row_loss.data());
    double target_weight = double(counts.classes);
    if (weight || smoothing > 0) {
      target_weight = 0;
      for (int64_t k = 0; k < count; ++k) {
        if (label[k] >= 0) {
          const double row_weight = weight ? double(weight[label[k]]) : 1.0;
          row_loss[k] *= confidence * row_weight;
          if (smoothing > 0) {
            row_loss[k] += smoothing * (weight_sum * double(log_sum[k]) +
                                        deficit(x + k * classes, weight, classes, maximum[begin + k]));
          }
          target_weight += row_weight;
        }
      }
    }
    if (grad_input && !is_one_visit) {
      gradient(x, grad, count, classes, label.data(), maximum + begin, sum + begin,
               terms.of(begin, count, label.data()));
    }
    if (loss) {
      std::transform(row_loss.begin(), row_loss.begin() + count, loss + begin,
                     [](double value) { return loss_t(value); });
    }
    return RowSums{sum_of(row_loss.data(), count), target_weight, counts.wrong};
  };
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, block_rows * classes));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    RowTerms<scalar_t, compute> terms(incoming, weight, weight_sum, grad_input ? rows : 0, classes,
                                      options.label_smoothing);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min((block + 1) * block_rows, rows);
      for (int64_t i = block * block_rows; i < last; i += at_once) {
        of_blocks[block] = of_blocks[block] + rows_between(i, std::min(i + at_once, last), terms);
      }
    }
  });
  return std::accumulate(of_blocks.begin(), of_blocks.end(), RowSums{});
}

// The gradient of the logits, which may take their place. Gives whether all labels are right.
template <typename scalar_t, typename grad_t>
bool cross_entropy_backward_rows(const RowGradients<grad_t, compute_t<scalar_t>>& incoming, const scalar_t* input,
                                 const int64_t* target, const scalar_t* weight, const compute_t<scalar_t>* maximum,
                                 const compute_t<scalar_t>* sum, scalar_t* grad_input, int64_t rows, int64_t classes,
                                 const Options& options) {
  const double weight_sum = sum_of_weights(weight, classes);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, classes));
  std::atomic<bool> are_right = true;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    std::array<int64_t, kRowsAtOnce> label;
    RowTerms<scalar_t, grad_t> terms(incoming, weight, weight_sum, last - first, classes, options.label_smoothing);
    for (int64_t begin = first; begin < last; begin += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, last - begin);
      if (kernels().labels(target + begin, count, classes, options.ignore_index, label.data()).wrong) {
        are_right = false;
      }
      gradient(input + begin * classes, grad_input + begin * classes, count, classes, label.data(), maximum + begin,
               sum + begin, terms.of(begin, count, label.data()));
    }
  });
  return are_right;
}

}  // namespace
}  // namespace torch_mlp

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

constexpr int64_t kElementsPerThread = 1 << 18;  // exponentials that pay for waking a thread: 0.1 ms
// The blocks of rows whose losses are summed: at most so many, of at least so many logits each.
constexpr int64_t kMaxSumBlocks = 64;
constexpr int64_t kMinSumElements = 1 << 12;
constexpr int64_t kRowsAtOnce = 256;  // whose statistics stay in the first-level cache

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
void gradient(const scalar_t* x, const scalar_t* weight, scalar_t* grad, int64_t rows, int64_t classes,
              const compute_t<scalar_t>* maximum, const compute_t<scalar_t>* sum, const double* numerator,
              const compute_t<scalar_t>* offset, const int64_t* label, const compute_t<scalar_t>* at_label) {
  using compute = compute_t<scalar_t>;
  if constexpr (has_vector_kernels<scalar_t>) {
    softmax_kernels<scalar_t>().gradient(bits_of(x), bits_of(weight), bits_of(grad), rows, classes, maximum, sum,
                                         numerator, offset, label, at_label);
  } else {
    for (int64_t i = 0; i < rows; ++i, x += classes, grad += classes) {
      const compute factor = compute(numerator[i] / double(sum[i]));
      for (int64_t c = 0; c < classes; ++c) {
        const compute elsewhere = offset ? offset[i] * (weight ? compute(weight[c]) : compute(1)) : compute(0);
        const compute value = factor * std::exp(compute(x[c]) - maximum[i]) - (c == label[i] ? at_label[i] : elsewhere);
        grad[c] = scalar_t(label[i] < 0 ? compute(0) : value);
      }
    }
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

// Writes each row's maximum and sum, and its loss unless that is null.
template <typename scalar_t, typename loss_t>
RowSums cross_entropy_rows(const scalar_t* input, const int64_t* target, const scalar_t* weight, loss_t* loss,
                           compute_t<scalar_t>* maximum, compute_t<scalar_t>* sum, int64_t rows, int64_t classes,
                           const Options& options) {
  using compute = compute_t<scalar_t>;
  const double confidence = 1 - options.label_smoothing, smoothing = options.label_smoothing / double(classes);
  const double weight_sum = sum_of_weights(weight, classes);
  const int64_t block_rows =
      std::max(ceil_div(rows, kMaxSumBlocks), ceil_div(kMinSumElements, std::max<int64_t>(1, classes)));
  const int64_t blocks = ceil_div(rows, block_rows);
  std::array<RowSums, kMaxSumBlocks> of_blocks{};

  const auto rows_between = [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    std::array<int64_t, kRowsAtOnce> label;
    std::array<compute, kRowsAtOnce> at_label, log_sum;
    std::array<double, kRowsAtOnce> row_loss;
    const LabelCounts counts = kernels().labels(target + begin, count, classes, options.ignore_index, label.data());
    statistics(input + begin * classes, label.data(), count, classes, maximum + begin, sum + begin, at_label.data());
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
                                        deficit(input + (begin + k) * classes, weight, classes, maximum[begin + k]));
          }
          target_weight += row_weight;
        }
      }
    }
    if (loss) {
      std::transform(row_loss.begin(), row_loss.begin() + count, loss + begin,
                     [](double value) { return loss_t(value); });
    }
    return RowSums{sum_of(row_loss.data(), count), target_weight, counts.wrong};
  };
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, block_rows * classes));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min((block + 1) * block_rows, rows);
      for (int64_t i = block * block_rows; i < last; i += kRowsAtOnce) {
        of_blocks[block] = of_blocks[block] + rows_between(i, std::min(i + kRowsAtOnce, last));
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
  using compute = compute_t<scalar_t>;
  const double confidence = 1 - options.label_smoothing, smoothing = options.label_smoothing / double(classes);
  const double weight_sum = sum_of_weights(weight, classes);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, classes));
  std::atomic<bool> are_right = true;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    std::array<int64_t, kRowsAtOnce> label;
    std::array<double, kRowsAtOnce> numerator;
    std::array<compute, kRowsAtOnce> offset, at_label;
    const auto set_row = [&](int64_t k, double scale, double target_weight) {
      const double row_weight = confidence * target_weight;
      numerator[k] = scale * (row_weight + smoothing * weight_sum);
      offset[k] = compute(scale * smoothing);
      // The sum of both: one class alone must get exactly 0.
      at_label[k] = compute(scale * (row_weight + smoothing * target_weight));
    };
    const bool are_alike = !incoming.of_rows && !incoming.of_lse && !weight;
    for (int64_t k = 0; are_alike && k < std::min(kRowsAtOnce, last - first); ++k) {
      set_row(k, incoming.of_all, 1);
    }
    for (int64_t begin = first; begin < last; begin += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, last - begin);
      if (kernels().labels(target + begin, count, classes, options.ignore_index, label.data()).wrong) {
        are_right = false;
      }
      for (int64_t k = 0; !are_alike && k < count; ++k) {
        set_row(k, incoming.of_rows ? double(incoming.of_rows[(begin + k) * incoming.stride]) : incoming.of_all,
                weight && label[k] >= 0 ? double(weight[label[k]]) : 1.0);
        numerator[k] += incoming.of_lse ? double(incoming.of_lse[begin + k]) : 0.0;
      }
      gradient(input + begin * classes, weight, grad_input + begin * classes, count, classes, maximum + begin,
               sum + begin, numerator.data(), smoothing == 0 ? nullptr : offset.data(), label.data(), at_label.data());
    }
  });
  return are_right;
}

}  // namespace
}  // namespace torch_mlp

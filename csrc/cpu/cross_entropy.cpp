// Softmax cross-entropy with class-index targets on the CPU.
//
//   lse = log(sum_c exp(x_c)) = m + log(s), with m = max_c x_c and s = sum_c exp(x_c - m)      p = exp(x - m) / s
//   forward     l_i  = (1 - e) w_y (lse - x_y) + e / C * sum_c w_c (lse - x_c)      reduced by none, sum, or
//               mean = sum_i l_i / sum_i w_y(i)
//   backward    gx_c = g_i * ((1 - e) w_y (p_c - [c = y]) + e / C * (p_c sum_k w_k - w_c))
//
// Shapes: x (batch, num_classes), y (batch,), w (num_classes,), lse (2, batch) = (m, s). e is the label smoothing. Rows
// whose target is ignore_index have loss 0 and gradient 0, whatever they hold.
// lse is kept as m and s, for m + log(s) would lose the digits of log(s) when the logits are large: exp(x - m) / s is
// as exact for logits near 10,000 as for logits near 0. Fused: softmax and loss in one visit of a row while it is in
// cache; the gradient in one sweep, p never stored. What visits every logit is in softmax.h, for float and bfloat16;
// the other dtypes take plain loops. Threads: by blocks of rows. The loss is summed per block, then over the blocks;
// their number depends on the shape alone, so that the bits do not depend on the number of threads.
#include <sys/mman.h>

#include <algorithm>
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

// Labels are checked before anything is written, and outside the parallel region, whose exceptions lose their type.
void check_labels(const char* op, const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  const auto is_valid = [=](int64_t label) { return uint64_t(label) < uint64_t(classes) || label == ignore_index; };
  const int64_t* wrong = std::find_if_not(target, target + rows, is_valid);
  if (wrong != target + rows) {
    check<std::out_of_range>(false, op, ": expected target in [0, ", classes, ") or ignore_index ", ignore_index,
                             ", got ", *wrong, " at position ", wrong - target);
  }
}

template <typename scalar_t>
double sum_of(const scalar_t* weight, int64_t classes) {
  return weight ? std::accumulate(weight, weight + classes, 0.0,
                                  [](double sum, scalar_t value) { return sum + double(value); })
                : double(classes);
}

// --- the work on every logit ---

// maximum[i] and sum[i] = sum_c exp(x[i, c] - maximum[i]) of some rows.
template <typename scalar_t>
void statistics(const scalar_t* x, int64_t rows, int64_t classes, compute_t<scalar_t>* maximum,
                compute_t<scalar_t>* sum) {
  using compute = compute_t<scalar_t>;
  if constexpr (has_vector_kernels<scalar_t>) {
    softmax_kernels<scalar_t>().statistics(bits_of(x), rows, classes, maximum, sum);
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
    }
  }
}

template <typename compute>
void logarithms(const compute* x, compute* y, int64_t count) {
  if constexpr (std::is_same_v<compute, float>) {
    kernels().log(x, y, count);
  } else {
    std::transform(x, x + count, y, [](compute value) { return std::log(value); });
  }
}

// sum_c w_c (maximum - x_c)
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

// gx_ic = factor_i * exp(x_ic - maximum_i) - (c == y_i ? at_target_i : offset_i * w_c) of some rows.
template <typename scalar_t>
void gradient(const scalar_t* x, const scalar_t* weight, scalar_t* grad, int64_t rows, int64_t classes,
              const compute_t<scalar_t>* maximum, const compute_t<scalar_t>* factor, const compute_t<scalar_t>* offset,
              const int64_t* target, const compute_t<scalar_t>* at_target) {
  using compute = compute_t<scalar_t>;
  if constexpr (has_vector_kernels<scalar_t>) {
    softmax_kernels<scalar_t>().gradient(bits_of(x), bits_of(weight), bits_of(grad), rows, classes, maximum, factor,
                                         offset, target, at_target);
  } else {
    for (int64_t i = 0; i < rows; ++i, x += classes, grad += classes) {
      for (int64_t c = 0; c < classes; ++c) {
        const compute elsewhere = offset ? offset[i] * (weight ? compute(weight[c]) : compute(1)) : compute(0);
        grad[c] =
            scalar_t(factor[i] * std::exp(compute(x[c]) - maximum[i]) - (c == target[i] ? at_target[i] : elsewhere));
      }
    }
  }
}

// --- the work on every row ---

template <typename scalar_t>
void cross_entropy_rows(const scalar_t* input, const int64_t* target, const scalar_t* weight, scalar_t* loss,
                        compute_t<scalar_t>* lse, compute_t<scalar_t>* total_weight, int64_t rows, int64_t classes,
                        const Options& options) {
  using compute = compute_t<scalar_t>;
  const double smoothing = options.label_smoothing / double(classes), weight_sum = sum_of(weight, classes);
  const int64_t block_rows =
      std::max(ceil_div(rows, kMaxSumBlocks), ceil_div(kMinSumElements, std::max<int64_t>(1, classes)));
  const int64_t blocks = ceil_div(rows, block_rows);
  std::array<double, kMaxSumBlocks> loss_sums{}, weight_sums{};

  // Gives the sums of the losses and of the weights of the targets.
  const auto rows_between = [&](int64_t begin, int64_t end) {
    compute* maximum = lse + begin;
    compute* sum = lse + rows + begin;
    statistics(input + begin * classes, end - begin, classes, maximum, sum);
    std::array<compute, kRowsAtOnce> log_sum;
    logarithms(sum, log_sum.data(), end - begin);
    double loss_sum = 0, sum_of_weights = 0;
    for (int64_t i = begin; i < end; ++i) {
      const scalar_t* x = input + i * classes;
      double row_loss = 0, row_weight = 0;
      if (target[i] != options.ignore_index) {
        const double log_of_sum = log_sum[i - begin];
        row_weight = weight ? double(weight[target[i]]) : 1.0;
        row_loss = (1 - options.label_smoothing) * row_weight * (log_of_sum + (double(lse[i]) - double(x[target[i]])));
        if (options.label_smoothing > 0) {
          row_loss += smoothing * (weight_sum * log_of_sum + deficit(x, weight, classes, lse[i]));
        }
      }
      if (options.reduction == Reduction::None) {
        loss[i] = scalar_t(row_loss);
      }
      loss_sum += row_loss;
      sum_of_weights += row_weight;
    }
    return std::pair{loss_sum, sum_of_weights};
  };
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, block_rows * classes));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min((block + 1) * block_rows, rows);
      for (int64_t i = block * block_rows; i < last; i += kRowsAtOnce) {
        const auto [loss_sum, sum_of_weights] = rows_between(i, std::min(i + kRowsAtOnce, last));
        loss_sums[block] += loss_sum;
        weight_sums[block] += sum_of_weights;
      }
    }
  });

  const double loss_sum = std::accumulate(loss_sums.begin(), loss_sums.end(), 0.0);
  const double target_weight = std::accumulate(weight_sums.begin(), weight_sums.end(), 0.0);
  *total_weight = compute(target_weight);
  if (options.reduction != Reduction::None) {
    *loss = scalar_t(options.reduction == Reduction::Mean ? loss_sum / target_weight : loss_sum);
  }
}

template <typename scalar_t>
void cross_entropy_backward_rows(const scalar_t* grad_output, int64_t grad_stride, const scalar_t* input,
                                 const int64_t* target, const scalar_t* weight, const compute_t<scalar_t>* lse,
                                 compute_t<scalar_t> total_weight, scalar_t* grad_input, int64_t rows, int64_t classes,
                                 const Options& options) {
  using compute = compute_t<scalar_t>;
  const double smoothing = options.label_smoothing / double(classes), weight_sum = sum_of(weight, classes);
  const double scale_of_all = options.reduction == Reduction::None  ? 1.0
                              : options.reduction == Reduction::Sum ? double(*grad_output)
                                                                    : double(*grad_output) / double(total_weight);
  const auto rows_between = [&](int64_t begin, int64_t end) {
    std::array<compute, kRowsAtOnce> factor, offset, at_target;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i - begin;
      const bool has_weight = weight && target[i] != options.ignore_index;
      const double scale = options.reduction == Reduction::None ? double(grad_output[i * grad_stride]) : scale_of_all;
      const double target_weight = has_weight ? double(weight[target[i]]) : 1.0;
      const double row_weight = (1 - options.label_smoothing) * target_weight;
      factor[k] = compute(scale * (row_weight + smoothing * weight_sum) / double(lse[rows + i]));
      offset[k] = compute(scale * smoothing);
      // The sum of both: one class alone must get exactly 0.
      at_target[k] = compute(scale * (row_weight + smoothing * target_weight));
    }
    gradient(input + begin * classes, weight, grad_input + begin * classes, end - begin, classes, lse + begin,
             factor.data(), smoothing == 0 ? nullptr : offset.data(), target + begin, at_target.data());
    for (int64_t i = begin; i < end; ++i) {
      if (target[i] == options.ignore_index) {
        std::fill_n(grad_input + i * classes, classes, scalar_t(0));
      }
    }
  };
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, classes));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kRowsAtOnce) {
      rows_between(i, std::min(i + kRowsAtOnce, end));
    }
  });
}

// Memory of this size comes fresh from the system each time, page by page. Asked for larger pages, it comes in a third
// of the time; a system that has none ignores the wish.
constexpr size_t kFreshBytes = 2 << 20;

void prefer_large_pages(const Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const size_t bytes = size_t(fresh.numel()) * fresh.element_size();
  if (bytes >= kFreshBytes) {
    const uintptr_t first = (begin + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / page * page, MADV_HUGEPAGE);
  }
#endif
}

// --- the ops ---

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& input, const Tensor& target,
                                                     const std::optional<Tensor>& weight, const std::string& reduction,
                                                     int64_t ignore_index, double label_smoothing) {
  constexpr const char* op = "cross_entropy";
  const Options options{check_reduction(op, reduction), ignore_index, label_smoothing};
  kernels();  // the first call may throw, which must not happen inside a parallel region
  check_cross_entropy(op, input, target, weight, label_smoothing);
  const int64_t rows = input.size(0), classes = input.size(1);
  const Tensor y = as_contiguous(target);
  check_labels(op, y.const_data_ptr<int64_t>(), rows, classes, ignore_index);

  Tensor loss, lse, total_weight;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const ScalarType compute_dtype = torch::headeronly::CppTypeToScalarType<compute>::value;
    const Tensor x = as_contiguous(input);
    const std::optional<Tensor> w = weight ? std::optional(as_contiguous(*weight)) : std::nullopt;
    loss = empty(options.reduction == Reduction::None ? std::vector<int64_t>{rows} : std::vector<int64_t>{},
                 input.scalar_type(), input);
    lse = empty({2, rows}, compute_dtype, input);
    total_weight = empty({}, compute_dtype, input);
    cross_entropy_rows<scalar_t>(x.const_data_ptr<scalar_t>(), y.const_data_ptr<int64_t>(),
                                 w ? w->const_data_ptr<scalar_t>() : nullptr, loss.mutable_data_ptr<scalar_t>(),
                                 lse.mutable_data_ptr<compute>(), total_weight.mutable_data_ptr<compute>(), rows,
                                 classes, options);
  });
  return {loss, lse, total_weight};
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                  const std::optional<Tensor>& weight, const Tensor& lse, const Tensor& total_weight,
                                  const std::string& reduction, int64_t ignore_index, double label_smoothing) {
  constexpr const char* op = "_cross_entropy_backward";
  const Options options{check_reduction(op, reduction), ignore_index, label_smoothing};
  kernels();  // the first call may throw, which must not happen inside a parallel region
  check_cross_entropy_backward(op, grad_output, input, target, weight, lse, total_weight, options.reduction,
                               label_smoothing);
  const int64_t rows = input.size(0), classes = input.size(1);
  const Tensor y = as_contiguous(target);
  check_labels(op, y.const_data_ptr<int64_t>(), rows, classes, ignore_index);

  Tensor grad_input = empty(sizes_of(input), input.scalar_type(), input);
  prefer_large_pages(grad_input);
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const Tensor x = as_contiguous(input), statistics = as_contiguous(lse);
    const std::optional<Tensor> w = weight ? std::optional(as_contiguous(*weight)) : std::nullopt;
    cross_entropy_backward_rows<scalar_t>(grad_output.const_data_ptr<scalar_t>(),
                                          grad_output.dim() ? grad_output.stride(0) : 0, x.const_data_ptr<scalar_t>(),
                                          y.const_data_ptr<int64_t>(), w ? w->const_data_ptr<scalar_t>() : nullptr,
                                          statistics.const_data_ptr<compute>(), *total_weight.const_data_ptr<compute>(),
                                          grad_input.mutable_data_ptr<scalar_t>(), rows, classes, options);
  });
  return grad_input;
}

}  // namespace
}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&torch_mlp::cross_entropy_cpu));
  m.impl("_cross_entropy_backward", TORCH_BOX(&torch_mlp::cross_entropy_backward_cpu));
}

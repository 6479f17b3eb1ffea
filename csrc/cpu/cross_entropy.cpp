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
// cache; the gradient in one sweep, p never stored. Threads: by blocks of rows. The loss is summed per block, then over
// the blocks; their number depends on the shape alone, so that the bits do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../tensor.h"

namespace torch_mlp {
namespace {

constexpr int64_t kElementsPerThread = 8192;  // exponentials that pay for waking a thread
constexpr int64_t kMaxSumBlocks = 64;

struct Options {
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing;
};

// Labels are checked before anything is written, and outside the parallel region, whose exceptions lose their type.
void check_labels(const char* op, const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  for (int64_t i = 0; i < rows; ++i) {
    check<std::out_of_range>((target[i] >= 0 && target[i] < classes) || target[i] == ignore_index, op,
                             ": expected target in [0, ", classes, ") or ignore_index ", ignore_index, ", got ",
                             target[i], " at position ", i);
  }
}

template <typename scalar_t>
double sum_of(const scalar_t* weight, int64_t classes) {
  double sum = 0;
  for (int64_t c = 0; c < classes; ++c) {
    sum += weight ? double(weight[c]) : 1.0;
  }
  return sum;
}

template <typename scalar_t>
void cross_entropy_rows(const scalar_t* input, const int64_t* target, const scalar_t* weight, scalar_t* loss,
                        compute_t<scalar_t>* lse, compute_t<scalar_t>* total_weight, int64_t rows, int64_t classes,
                        const Options& options) {
  using compute = compute_t<scalar_t>;
  const double smoothing = options.label_smoothing / double(classes), weight_sum = sum_of(weight, classes);
  const int64_t block_rows = std::max<int64_t>(1, ceil_div(rows, kMaxSumBlocks));
  const int64_t blocks = ceil_div(rows, block_rows);
  std::vector<double> loss_sums(blocks), weight_sums(blocks);

  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, block_rows * classes));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * block_rows; i < std::min(end * block_rows, rows); ++i) {
      const scalar_t* x = input + i * classes;
      compute maximum = -std::numeric_limits<compute>::infinity();
      for (int64_t c = 0; c < classes; ++c) {
        maximum = std::max(maximum, compute(x[c]));
      }
      double exp_sum = 0, smooth = 0;
      for (int64_t c = 0; c < classes; ++c) {
        exp_sum += std::exp(compute(x[c]) - maximum);
      }
      const double log_sum = std::log(exp_sum);
      lse[i] = maximum;
      lse[rows + i] = compute(exp_sum);

      double row_loss = 0, row_weight = 0;
      if (target[i] != options.ignore_index) {
        row_weight = weight ? double(weight[target[i]]) : 1.0;
        row_loss = (1 - options.label_smoothing) * row_weight * (log_sum + (double(maximum) - double(x[target[i]])));
        if (options.label_smoothing > 0) {
          for (int64_t c = 0; c < classes; ++c) {
            smooth += (weight ? double(weight[c]) : 1.0) * (double(maximum) - double(x[c]));
          }
          row_loss += smoothing * (weight_sum * log_sum + smooth);
        }
      }
      if (options.reduction == Reduction::None) {
        loss[i] = scalar_t(row_loss);
      }
      loss_sums[i / block_rows] += row_loss;
      weight_sums[i / block_rows] += row_weight;
    }
  });

  double loss_sum = 0, target_weight = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    loss_sum += loss_sums[block];
    target_weight += weight_sums[block];
  }
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
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, classes));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const scalar_t* x = input + i * classes;
      scalar_t* grad = grad_input + i * classes;
      if (target[i] == options.ignore_index) {
        std::fill(grad, grad + classes, scalar_t(0));
        continue;
      }
      const double scale = options.reduction == Reduction::None  ? double(grad_output[i * grad_stride])
                           : options.reduction == Reduction::Sum ? double(*grad_output)
                                                                 : double(*grad_output) / double(total_weight);
      const double row_weight = (1 - options.label_smoothing) * (weight ? double(weight[target[i]]) : 1.0);
      const double maximum = lse[i], sum = lse[rows + i];
      const compute of_exp = compute(scale * (row_weight + smoothing * weight_sum) / sum);
      const compute of_weight = compute(scale * smoothing);
      for (int64_t c = 0; c < classes; ++c) {
        grad[c] = scalar_t(of_exp * std::exp(compute(x[c]) - compute(maximum)) -
                           of_weight * (weight ? compute(weight[c]) : compute(1)));
      }
      // The target's own: here digits cancel as p nears 1, and one class alone must give exactly 0.
      const int64_t c = target[i];
      const double p = std::exp(double(x[c]) - maximum) / sum;
      grad[c] =
          scalar_t(scale * (row_weight * (p - 1) + smoothing * (weight_sum * p - (weight ? double(weight[c]) : 1.0))));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& input, const Tensor& target,
                                                     const std::optional<Tensor>& weight, const std::string& reduction,
                                                     int64_t ignore_index, double label_smoothing) {
  constexpr const char* op = "cross_entropy";
  const Options options{check_reduction(op, reduction), ignore_index, label_smoothing};
  check_cross_entropy(op, input, target, weight, label_smoothing);
  const int64_t rows = input.size(0), classes = input.size(1);
  const Tensor y = torch::stable::contiguous(target);
  check_labels(op, y.const_data_ptr<int64_t>(), rows, classes, ignore_index);

  Tensor loss, lse, total_weight;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const ScalarType compute_dtype = torch::headeronly::CppTypeToScalarType<compute>::value;
    const Tensor x = torch::stable::contiguous(input);
    const std::optional<Tensor> w = weight ? std::optional(torch::stable::contiguous(*weight)) : std::nullopt;
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
  check_cross_entropy_backward(op, grad_output, input, target, weight, lse, total_weight, options.reduction,
                               label_smoothing);
  const int64_t rows = input.size(0), classes = input.size(1);
  const Tensor y = torch::stable::contiguous(target);
  check_labels(op, y.const_data_ptr<int64_t>(), rows, classes, ignore_index);

  Tensor grad_input = empty(sizes_of(input), input.scalar_type(), input);
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const Tensor x = torch::stable::contiguous(input), statistics = torch::stable::contiguous(lse);
    const std::optional<Tensor> w = weight ? std::optional(torch::stable::contiguous(*weight)) : std::nullopt;
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

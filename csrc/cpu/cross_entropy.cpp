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
// as exact for logits near 10,000 as for logits near 0. Fused: softmax, loss and, where it is wanted, the gradient for
// a grad_output of 1 in one visit of a row while it is in cache, each exponential computed once; without it the
// backward pass takes one more sweep, p never stored. The work, and how it is threaded, is in cross_entropy_rows.h.
// lse is a result of its own, whose gradient h adds h_i p_c.
#include "../cross_entropy.h"

#include "cross_entropy_rows.h"

namespace torch_mlp {
namespace {

// Loss, lse, total weight and, if it is wanted, the gradient for a grad_output of 1, else an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> loss_and_gradient(const char* op, const Tensor& input, const Tensor& target,
                                                             const std::optional<Tensor>& weight,
                                                             const Options& options, bool needs_grad) {
  kernels();  // the first call may throw, which must not happen inside a parallel region
  check_cross_entropy(op, input, target, weight, options.label_smoothing);
  const int64_t rows = input.size(0), classes = input.size(1);
  const Tensor y = as_contiguous(target);
  const int64_t* labels = y.const_data_ptr<int64_t>();
  const bool is_none = options.reduction == Reduction::None;

  Tensor loss, lse, total_weight;
  Tensor grad_input = empty_in_large_pages(needs_grad ? sizes_of(input) : std::vector<int64_t>{0}, input);
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const ScalarType compute_dtype = torch::headeronly::CppTypeToScalarType<compute>::value;
    const Tensor x = as_contiguous(input);
    const std::optional<Tensor> w = weight ? std::optional(as_contiguous(*weight)) : std::nullopt;
    const scalar_t* weights = w ? w->const_data_ptr<scalar_t>() : nullptr;
    loss = empty(is_none ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, input.scalar_type(), input);
    lse = empty({2, rows}, compute_dtype, input);
    total_weight = empty({}, compute_dtype, input);
    scalar_t* losses = loss.mutable_data_ptr<scalar_t>();
    compute* maximum = lse.mutable_data_ptr<compute>();
    double scale = 1;
    if (needs_grad && options.reduction == Reduction::Mean) {
      scale /= total_weight_of(labels, weights, rows, classes, options.ignore_index);
    }
    const RowSums sums = cross_entropy_rows<scalar_t>(
        x.const_data_ptr<scalar_t>(), labels, weights, is_none ? losses : nullptr, maximum, maximum + rows,
        needs_grad ? grad_input.mutable_data_ptr<scalar_t>() : nullptr, scale, rows, classes, options);
    check_labels(op, sums.wrong == 0, labels, rows, classes, options.ignore_index);
    *total_weight.mutable_data_ptr<compute>() = compute(sums.weight);
    if (!is_none) {
      *losses = scalar_t(options.reduction == Reduction::Mean ? sums.loss / sums.weight : sums.loss);
    }
  });
  return {loss, lse, total_weight, grad_input};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& input, const Tensor& target,
                                                     const std::optional<Tensor>& weight, const std::string& reduction,
                                                     int64_t ignore_index, double label_smoothing) {
  constexpr const char* op = "cross_entropy";
  const Options options{check_reduction(op, reduction), ignore_index, label_smoothing};
  const auto [loss, lse, total_weight, _] = loss_and_gradient(op, input, target, weight, options, false);
  return {loss, lse, total_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_with_gradient_cpu(const Tensor& input, const Tensor& target,
                                                                           const std::optional<Tensor>& weight,
                                                                           const std::string& reduction,
                                                                           int64_t ignore_index,
                                                                           double label_smoothing) {
  constexpr const char* op = "cross_entropy";  // the name that its reader knows
  const Options options{check_reduction(op, reduction), ignore_index, label_smoothing};
  return loss_and_gradient(op, input, target, weight, options, true);
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& input,
                                  const Tensor& target, const std::optional<Tensor>& weight, const Tensor& lse,
                                  const Tensor& total_weight, const std::string& reduction, int64_t ignore_index,
                                  double label_smoothing) {
  constexpr const char* op = "_cross_entropy_backward";
  const Options options{check_reduction(op, reduction), ignore_index, label_smoothing};
  kernels();  // the first call may throw, which must not happen inside a parallel region
  check_cross_entropy_backward(op, grad_output, grad_lse, input, target, weight, lse, total_weight, options.reduction,
                               label_smoothing);
  const int64_t rows = input.size(0), classes = input.size(1);
  const Tensor y = as_contiguous(target);
  const int64_t* labels = y.const_data_ptr<int64_t>();

  Tensor grad_input = empty_in_large_pages(sizes_of(input), input);
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const Tensor x = as_contiguous(input), statistics = as_contiguous(lse);
    const std::optional<Tensor> w = weight ? std::optional(as_contiguous(*weight)) : std::nullopt;
    const std::optional<Tensor> h = grad_lse ? std::optional(as_contiguous(*grad_lse)) : std::nullopt;
    const compute* maximum = statistics.const_data_ptr<compute>();
    const RowGradients<scalar_t, compute> incoming =
        row_gradients<scalar_t, compute>(grad_output, h, *total_weight.const_data_ptr<compute>(), options.reduction);
    const bool are_right = cross_entropy_backward_rows<scalar_t>(
        incoming, x.const_data_ptr<scalar_t>(), labels, w ? w->const_data_ptr<scalar_t>() : nullptr, maximum,
        maximum + rows, grad_input.mutable_data_ptr<scalar_t>(), rows, classes, options);
    check_labels(op, are_right, labels, rows, classes, ignore_index);
  });
  return grad_input;
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&torch_mlp::cross_entropy_cpu));
  m.impl("_cross_entropy_with_gradient", TORCH_BOX(&torch_mlp::cross_entropy_with_gradient_cpu));
  m.impl("_cross_entropy_backward", TORCH_BOX(&torch_mlp::cross_entropy_backward_cpu));
}

// Softmax cross-entropy with class-index targets on CUDA.
//
//   lse = log(sum_c exp(x_c)) = m + log(s), with m = max_c x_c and s = sum_c exp(x_c - m)      p = exp(x - m) / s
//   forward     l_i  = (1 - e) w_y (lse - x_y) + e / C * sum_c w_c (lse - x_c)      reduced by none, sum, or
//               mean = sum_i l_i / sum_i w_y(i)
//   backward    gx_c = g_i * ((1 - e) w_y (p_c - [c = y]) + e / C * (p_c sum_k w_k - w_c))
//
// Shapes: x (batch, num_classes), y (batch,), w (num_classes,), lse (2, batch) = (m, s). e is the label smoothing. Rows
// whose target is ignore_index have loss 0 and gradient 0, whatever they hold.
// lse is kept as m and s, for m + log(s) would lose the digits of log(s) when the logits are large: exp(x - m) / s is
// as exact for logits near 10,000 as for logits near 0.
// Fused: softmax and loss in one sweep over a row, with a running maximum and a sum that is rescaled when the maximum
// grows (Milakov and Gimelshein, 2018, arXiv:1805.02867); label smoothing reads the row once more, from cache; the
// gradient in one sweep, p never stored. Nothing goes back to the host: the backward pass reads total_weight where it
// is. lse is a result of its own, whose gradient h adds h_i p_c.
// _cross_entropy_with_gradient computes the gradient for an upstream gradient of 1 with the loss, of rows that are
// still in the cache. _cross_entropy_rescale_ then has nothing to do if it is 1, which the device decides.
// The work, and how it is threaded, is in cross_entropy_rows.cuh.
#include "../cross_entropy.h"

#include "cross_entropy_rows.cuh"

namespace torch_mlp {
namespace {

// Loss, lse and total weight, and the gradient for a grad_output of 1 where it is wanted, else of no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const char* op, const Tensor& input, const Tensor& target,
                                                   const std::optional<Tensor>& weight, const std::string& reduction,
                                                   int64_t ignore_index, double label_smoothing, bool with_gradient) {
  const Reduction reduce = check_reduction(op, reduction);
  check_cross_entropy(op, input, target, weight, label_smoothing);
  const DeviceGuard guard(input.get_device_index());
  const int64_t rows = input.size(0), classes = input.size(1);
  const Tensor x = as_contiguous(input), y = as_contiguous(target);
  const std::optional<Tensor> w = weight ? std::optional(as_contiguous(*weight)) : std::nullopt;

  Tensor loss, lse, total_weight, grad_input;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const ScalarType compute_dtype = torch::headeronly::CppTypeToScalarType<compute>::value;
    const bool is_none = reduce == Reduction::None, is_mean = reduce == Reduction::Mean;
    loss = empty(is_none ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, input.scalar_type(), input);
    lse = empty({2, rows}, compute_dtype, input);
    total_weight = empty({}, compute_dtype, input);
    grad_input = empty(with_gradient ? sizes_of(input) : std::vector<int64_t>{0}, input.scalar_type(), input);
    scalar_t* losses = loss.mutable_data_ptr<scalar_t>();
    compute* maximum = lse.mutable_data_ptr<compute>();
    const std::optional<Tensor> weight_sum = sum_of_weights<scalar_t>(w, label_smoothing);
    std::optional<Tensor> divisor;
    if (with_gradient && is_mean) {
      divisor = total_weight_of<scalar_t>(y, w, classes, ignore_index);
    }
    const cudaStream_t stream = current_stream(input);
    const unsigned int blocks = sum_blocks_of(rows, classes);
    const Tensor partials = empty({blocks, 2}, ScalarType::Double, input);
    cross_entropy_rows(x.const_data_ptr<scalar_t>(), y.const_data_ptr<int64_t>(), data_of<scalar_t>(w),
                       data_of<double>(weight_sum), is_none ? losses : nullptr, maximum, maximum + rows,
                       partials.mutable_data_ptr<double>(), blocks, rows, classes,
                       options_of(ignore_index, label_smoothing, classes), stream, data_of<compute>(divisor),
                       with_gradient ? grad_input.mutable_data_ptr<scalar_t>() : nullptr);
    sum_losses(partials, is_none ? nullptr : losses, total_weight.mutable_data_ptr<compute>(), is_mean, stream);
  });
  return {loss, lse, total_weight, grad_input};
}

// Writes grad_input; where holds_one, it is there for a grad_output of 1.
void backward(const char* op, const Tensor& grad_input, bool holds_one, const Tensor& grad_output,
              const std::optional<Tensor>& grad_lse, const Tensor& input, const Tensor& target,
              const std::optional<Tensor>& weight, const Tensor& lse, const Tensor& total_weight,
              const std::string& reduction, int64_t ignore_index, double label_smoothing) {
  const Reduction reduce = check_reduction(op, reduction);
  check_cross_entropy_backward(op, grad_output, grad_lse, input, target, weight, lse, total_weight, reduce,
                               label_smoothing);
  const DeviceGuard guard(input.get_device_index());
  const int64_t rows = input.size(0), classes = input.size(1);
  if (input.numel() == 0) {
    return;
  }
  const Tensor x = as_contiguous(input), y = as_contiguous(target);
  const Tensor statistics = as_contiguous(lse);
  const std::optional<Tensor> h = grad_lse ? std::optional(as_contiguous(*grad_lse)) : std::nullopt;
  const std::optional<Tensor> w = weight ? std::optional(as_contiguous(*weight)) : std::nullopt;

  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const std::optional<Tensor> weight_sum = sum_of_weights<scalar_t>(w, label_smoothing);
    const compute* maximum = statistics.const_data_ptr<compute>();
    cross_entropy_backward_rows(row_gradients<scalar_t, compute>(grad_output, h, total_weight, reduce),
                                x.const_data_ptr<scalar_t>(), y.const_data_ptr<int64_t>(), data_of<scalar_t>(w),
                                data_of<double>(weight_sum), maximum, maximum + rows,
                                grad_input.mutable_data_ptr<scalar_t>(), rows, classes,
                                options_of(ignore_index, label_smoothing, classes), current_stream(input), holds_one);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cuda(const Tensor& input, const Tensor& target,
                                                      const std::optional<Tensor>& weight, const std::string& reduction,
                                                      int64_t ignore_index, double label_smoothing) {
  const auto [loss, lse, total_weight, none] =
      forward("cross_entropy", input, target, weight, reduction, ignore_index, label_smoothing, false);
  return {loss, lse, total_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_with_gradient_cuda(const Tensor& input, const Tensor& target,
                                                                            const std::optional<Tensor>& weight,
                                                                            const std::string& reduction,
                                                                            int64_t ignore_index,
                                                                            double label_smoothing) {
  return forward("_cross_entropy_with_gradient", input, target, weight, reduction, ignore_index, label_smoothing, true);
}

Tensor cross_entropy_backward_cuda(const Tensor& grad_output, const std::optional<Tensor>& grad_lse,
                                   const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                   const Tensor& lse, const Tensor& total_weight, const std::string& reduction,
                                   int64_t ignore_index, double label_smoothing) {
  Tensor grad_input = empty(sizes_of(input), input.scalar_type(), input);
  backward("_cross_entropy_backward", grad_input, false, grad_output, grad_lse, input, target, weight, lse,
           total_weight, reduction, ignore_index, label_smoothing);
  return grad_input;
}

void cross_entropy_rescale_cuda(const Tensor& gradient, const Tensor& grad_output, const Tensor& input,
                                const Tensor& target, const std::optional<Tensor>& weight, const Tensor& lse,
                                const Tensor& total_weight, const std::string& reduction, int64_t ignore_index,
                                double label_smoothing) {
  constexpr const char* op = "_cross_entropy_rescale_";
  check_like_input(op, "gradient", gradient, input);
  check_shape(op, "gradient", gradient, input.sizes());
  check(gradient.is_contiguous(), op, ": expected a contiguous gradient, got another");
  check(grad_output.dim() == 0, op, ": expected grad_output of shape (), got ", shape_of(grad_output.sizes()));
  backward(op, gradient, true, grad_output, std::nullopt, input, target, weight, lse, total_weight, reduction,
           ignore_index, label_smoothing);
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&torch_mlp::cross_entropy_cuda));
  m.impl("_cross_entropy_with_gradient", TORCH_BOX(&torch_mlp::cross_entropy_with_gradient_cuda));
  m.impl("_cross_entropy_backward", TORCH_BOX(&torch_mlp::cross_entropy_backward_cuda));
  m.impl("_cross_entropy_rescale_", TORCH_BOX(&torch_mlp::cross_entropy_rescale_cuda));
}

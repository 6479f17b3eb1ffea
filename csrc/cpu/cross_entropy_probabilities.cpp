// Softmax cross-entropy with a number for each class as target, its probability mostly, on the CPU.
//
//   lse = log(sum_c exp(x_c)) = m + log(s), kept as m and s (cross_entropy.cpp says why)      p = exp(x - m) / s
//   forward     l_i  = sum_c t_c (lse - x_c)      reduced by none, sum, or mean = sum_i l_i / batch
//   backward    gx_c = g_i (p_c sum_k t_k - t_c) + h_i p_c      gt_c = g_i (lse - x_c)
//
// Shapes: x and t (batch, num_classes), lse (2, batch) = (m, s); h is the gradient of lse. Class weights and label
// smoothing are in t already.
// Fused: softmax and loss in two visits of a row while it is in cache, each gradient in one sweep, p never stored.
// Threads: by rows, as in cross_entropy_rows.h.

#include "cross_entropy_rows.h"

namespace torch_mlp {
namespace {

// In parts, whose additions need not wait for each other.
template <typename scalar_t>
double sum_of_row(const scalar_t* values, int64_t count) {
  constexpr int64_t width = 8;
  double parts[width] = {};
  int64_t c = 0;
  for (; c + width <= count; c += width) {
    for (int64_t part = 0; part < width; ++part) {
      parts[part] += double(values[c + part]);
    }
  }
  for (; c < count; ++c) {
    parts[0] += double(values[c]);
  }
  return std::accumulate(parts, parts + width, 0.0);
}

int64_t grain_of(int64_t classes) { return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, classes)); }

// Writes each row's maximum and sum, and its loss.
template <typename scalar_t>
void probabilities_rows(const scalar_t* input, const scalar_t* target, double* loss, compute_t<scalar_t>* maximum,
                        compute_t<scalar_t>* sum, int64_t rows, int64_t classes) {
  using compute = compute_t<scalar_t>;
  torch::stable::parallel_for(0, rows, grain_of(classes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t no_label = -1;
      compute at_label;
      statistics(input + i * classes, &no_label, 1, classes, maximum + i, sum + i, &at_label);
      loss[i] = classes == 0 ? 0
                             : sum_of_row(target + i * classes, classes) * std::log(double(sum[i])) +
                                   deficit(input + i * classes, target + i * classes, classes, maximum[i]);
    }
  });
}

template <typename scalar_t>
void probabilities_backward_rows(const RowGradients<scalar_t, compute_t<scalar_t>>& incoming, const scalar_t* input,
                                 const scalar_t* target, const compute_t<scalar_t>* maximum,
                                 const compute_t<scalar_t>* sum, scalar_t* grad_input, scalar_t* grad_target,
                                 int64_t rows, int64_t classes) {
  using compute = compute_t<scalar_t>;
  torch::stable::parallel_for(0, rows, grain_of(classes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const scalar_t *x = input + i * classes, *t = target + i * classes;
      const double scale = incoming.of_rows ? double(incoming.of_rows[i * incoming.stride]) : incoming.of_all;
      if (grad_input && classes > 0) {
        const double of_lse = incoming.of_lse ? double(incoming.of_lse[i]) : 0.0;
        const compute numerator = compute(scale * sum_of_row(t, classes) + of_lse);
        // The first class's own is rounded as the numerator is: one class alone must get exactly 0.
        const compute offset = compute(scale), at_first = compute(scale * double(t[0]));
        const int64_t first = 0;
        gradient(x, grad_input + i * classes, 1, classes, &first, maximum + i, sum + i,
                 TermsOf<scalar_t>{t, &numerator, &offset, &at_first});
      }
      if (grad_target) {
        const compute log_sum = compute(std::log(double(sum[i]))), factor = compute(scale);
        for (int64_t c = 0; c < classes; ++c) {
          grad_target[i * classes + c] = scalar_t(factor * (log_sum + (maximum[i] - compute(x[c]))));
        }
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> cross_entropy_probabilities_cpu(const Tensor& input, const Tensor& target,
                                                           const std::string& reduction) {
  constexpr const char* op = "cross_entropy_probabilities";
  const Reduction reduce = check_reduction(op, reduction);
  kernels();  // the first call may throw, which must not happen inside a parallel region
  check_cross_entropy_probabilities(op, input, target);
  const int64_t rows = input.size(0), classes = input.size(1);
  Tensor loss, lse;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const Tensor x = as_contiguous(input), t = as_contiguous(target);
    loss = empty(reduce == Reduction::None ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, input.scalar_type(),
                 input);
    lse = empty({2, rows}, torch::headeronly::CppTypeToScalarType<compute>::value, input);
    compute* maximum = lse.mutable_data_ptr<compute>();
    std::vector<double> of_rows(rows);
    probabilities_rows(x.const_data_ptr<scalar_t>(), t.const_data_ptr<scalar_t>(), of_rows.data(), maximum,
                       maximum + rows, rows, classes);
    scalar_t* losses = loss.mutable_data_ptr<scalar_t>();
    if (reduce == Reduction::None) {
      std::transform(of_rows.begin(), of_rows.end(), losses, [](double value) { return scalar_t(value); });
    } else {
      const double total = sum_of(of_rows.data(), rows);
      *losses = scalar_t(reduce == Reduction::Mean ? total / double(classes ? rows : 0) : total);  // NaN as in torch
    }
  });
  return {loss, lse};
}

std::tuple<Tensor, Tensor> cross_entropy_probabilities_backward_cpu(const Tensor& grad_output,
                                                                    const std::optional<Tensor>& grad_lse,
                                                                    const Tensor& input, const Tensor& target,
                                                                    const Tensor& lse, const std::string& reduction,
                                                                    bool needs_grad_input, bool needs_grad_target) {
  constexpr const char* op = "_cross_entropy_probabilities_backward";
  const Reduction reduce = check_reduction(op, reduction);
  kernels();
  check_cross_entropy_probabilities_backward(op, grad_output, grad_lse, input, target, lse, reduce);
  const int64_t rows = input.size(0), classes = input.size(1);
  const std::vector<int64_t> none{0};
  Tensor grad_input = empty(needs_grad_input ? sizes_of(input) : none, input.scalar_type(), input);
  Tensor grad_target = empty(needs_grad_target ? sizes_of(input) : none, input.scalar_type(), input);
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const Tensor x = as_contiguous(input), t = as_contiguous(target), statistics = as_contiguous(lse);
    const std::optional<Tensor> h = grad_lse ? std::optional(as_contiguous(*grad_lse)) : std::nullopt;
    const compute* maximum = statistics.const_data_ptr<compute>();
    probabilities_backward_rows<scalar_t>(
        row_gradients<scalar_t, compute>(grad_output, h, double(rows), reduce), x.const_data_ptr<scalar_t>(),
        t.const_data_ptr<scalar_t>(), maximum, maximum + rows,
        needs_grad_input ? grad_input.mutable_data_ptr<scalar_t>() : nullptr,
        needs_grad_target ? grad_target.mutable_data_ptr<scalar_t>() : nullptr, rows, classes);
  });
  return {grad_input, grad_target};
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CPU, m) {
  m.impl("cross_entropy_probabilities", TORCH_BOX(&torch_mlp::cross_entropy_probabilities_cpu));
  m.impl("_cross_entropy_probabilities_backward", TORCH_BOX(&torch_mlp::cross_entropy_probabilities_backward_cpu));
}

// A linear layer and the softmax cross-entropy of its output, the logits, on the CPU.
//
//   z = x W^T + b, and loss, lse and gz, the gradient of z, as in cross_entropy.cpp
//   backward    gx = gz W      gW = gz^T x      gb = sum over the batch of gz
//
// Shapes: x (batch, in_features), W (num_classes, in_features), b (num_classes,).
// Fused: z is there for some rows at a time only, and its gradient takes its place. Where the loss is reduced, the
// forward pass computes the gradients with it, for a grad_output of 1, so that z need not be computed again; else, and
// where lse has a gradient, the backward pass computes z anew. Memory beyond results: kChunkRows of z or kCacheBytes,
// whichever is more; and for 16-bit dtypes gW in float, in which the chunks' are summed. The loss of those is in float
// too. Threads: those of the products and of the softmax, see products.cpp and cross_entropy_rows.h.
#include "../linear_cross_entropy.h"

#include "cross_entropy_rows.h"
#include "products.h"

namespace torch_mlp {
namespace {

// Of logits at once: as many rows as make a product worth while, or, where the classes are few, fill a part of the
// cache. Of 1024 rows and 32000 classes, chunks of 64 rows take 1.07 times as long as those of 128, chunks of 256 rows
// 0.98 times, at twice the memory. In 16 bits the weight is packed anew for each, and each rounds its part of gW.
template <typename scalar_t>
constexpr int64_t kChunkRows = sizeof(scalar_t) == 2 ? 512 : 128;
constexpr int64_t kCacheBytes = 1 << 20;

// Of the gradient of the logits at once: what the one product has brought into cache, the other one finds there. All of
// 32000 classes at once take 1.04 times as long. In 16 bits there is one block, all of gW being summed in float.
constexpr int64_t kBlockClasses = 1 << 10;

// The gradients, to which chunks of rows add.
template <typename scalar_t>
class Gradients {
 public:
  Gradients(const Arguments& of, Needs needs)
      : input(empty_in_large_pages(needs.input ? sizes_of(of.input) : kNone, of.input)),
        weight(empty_in_large_pages(needs.weight ? sizes_of(of.linear_weight) : kNone, of.input)),
        bias(empty({needs.bias ? of.linear_weight.size(0) : 0}, of.input.scalar_type(), of.input)),
        of_(of),
        needs_(needs),
        bias_sums_(needs.bias ? of.linear_weight.size(0) : 0) {
    if (needs.weight && of.input.size(0) == 0) {
      std::fill_n(weight.mutable_data_ptr<scalar_t>(), weight.numel(), scalar_t(0));
    }
  }

  // grad_logits of the rows from begin to end; is_last: of the last ones.
  void add(const Tensor& grad_logits, int64_t begin, int64_t end, bool is_last) {
    const Tensor x = rows_of(of_.input, begin, end);
    const int64_t classes = grad_logits.size(1), block = kIs16Bit ? classes : kBlockClasses;
    int64_t first = 0;
    do {
      const int64_t last = std::min(first + block, classes);
      const Tensor of_block = columns_of(grad_logits, first, last);
      if (needs_.input) {
        linear_grad_input_out_cpu(rows_of(input, begin, end), of_block, rows_of(of_.linear_weight, first, last),
                                  first > 0);
      }
      if (needs_.weight) {
        add_weight(of_block, x, rows_of(weight, first, last), begin == 0, is_last);
      }
      first = last;
    } while (first < classes);
    if (needs_.bias) {
      add_bias(grad_logits.const_data_ptr<scalar_t>(), end - begin);
    }
  }

  std::tuple<Tensor, Tensor, Tensor> results() {
    std::transform(bias_sums_.begin(), bias_sums_.end(), bias.mutable_data_ptr<scalar_t>(),
                   [](double sum) { return scalar_t(sum); });
    return {input, weight, bias};
  }

  Tensor input, weight, bias;

 private:
  static constexpr bool kIs16Bit = sizeof(scalar_t) == 2;
  static inline const std::vector<int64_t> kNone{0};

  void add_bias(const scalar_t* grad, int64_t rows) {
    const int64_t cols = bias_sums_.size();
    if constexpr (has_vector_kernels<scalar_t>) {
      elementwise_kernels<scalar_t>().activation_backward(ActivationKind::Identity, {bits_of(grad), cols},
                                                          {bits_of(grad), cols}, {nullptr, 0}, bias_sums_.data(), rows,
                                                          cols);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          bias_sums_[j] += double(grad[i * cols + j]);
        }
      }
    }
  }

  void add_weight(const Tensor& grad_logits, const Tensor& x, const Tensor& of_classes, bool is_first, bool is_last) {
    if (!kIs16Bit || (is_first && is_last)) {
      linear_grad_weight_out_cpu(of_classes, grad_logits, x, !is_first);
      return;
    }
    // Until the last chunk, weight itself is the memory for a chunk's gradient.
    if (is_first) {
      weight_sums_.resize(weight.numel());
    }
    linear_grad_weight_out_cpu(weight, grad_logits, x, false);
    scalar_t* of_chunk = weight.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, weight.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        weight_sums_[k] += float(of_chunk[k]);
        if (is_last) {
          of_chunk[k] = scalar_t(weight_sums_[k]);
        }
      }
    });
  }

  const Arguments& of_;
  const Needs needs_;
  std::vector<double> bias_sums_;
  std::vector<float> weight_sums_;
};

// Calls body(logits, begin, end, is_last) for chunk after chunk of rows.
template <typename scalar_t, typename Body>
void for_each_chunk(const Arguments& of, const Body& body) {
  const int64_t rows = of.input.size(0), classes = of.linear_weight.size(0);
  const int64_t of_row = std::max<int64_t>(1, classes) * int64_t(sizeof(scalar_t));
  const int64_t chunk = std::min(rows, std::max(kChunkRows<scalar_t>, kCacheBytes / of_row));
  const Tensor memory = empty_in_large_pages({chunk, classes}, of.input);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = std::min(begin + chunk, rows);
    const Tensor logits = rows_of(memory, 0, end - begin);
    if (classes > 0) {
      linear_act_out_cpu<Identity>(logits, rows_of(of.input, begin, end), of.linear_weight, of.linear_bias);
    }
    body(logits, begin, end, end == rows);
  }
}

template <typename scalar_t>
const scalar_t* weight_of(const Arguments& of) {
  return of.weight ? of.weight->const_data_ptr<scalar_t>() : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_cpu(
    const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias, const Tensor& target,
    const std::optional<Tensor>& weight, const std::string& reduction, int64_t ignore_index, double label_smoothing,
    bool needs_grad_input, bool needs_grad_weight, bool needs_grad_bias) {
  constexpr const char* op = "linear_cross_entropy";
  const Options options{check_reduction(op, reduction), ignore_index, label_smoothing};
  kernels();  // the first call may throw, which must not happen inside a parallel region
  check_linear_cross_entropy(op, input, linear_weight, linear_bias, target, weight, label_smoothing);
  const Arguments of = contiguous_arguments(input, linear_weight, linear_bias, target, weight);
  const int64_t rows = input.size(0), classes = linear_weight.size(0);
  const bool is_none = options.reduction == Reduction::None;
  const Needs needs{!is_none && needs_grad_input, !is_none && needs_grad_weight, !is_none && needs_grad_bias};
  const int64_t* labels = of.target.const_data_ptr<int64_t>();

  Tensor loss, lse, total_weight;
  std::tuple<Tensor, Tensor, Tensor> grads;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const ScalarType compute_dtype = torch::headeronly::CppTypeToScalarType<compute>::value;
    loss = empty(is_none ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, compute_dtype, input);
    lse = empty({2, rows}, compute_dtype, input);
    total_weight = empty({}, compute_dtype, input);
    compute *maximum = lse.mutable_data_ptr<compute>(), *sum = maximum + rows;
    compute* losses = loss.mutable_data_ptr<compute>();
    Gradients<scalar_t> gradients(of, needs);
    double scale = 1;
    if (needs.any() && options.reduction == Reduction::Mean) {
      scale /= total_weight_of(labels, weight_of<scalar_t>(of), rows, classes, ignore_index);
    }
    RowSums sums;
    for_each_chunk<scalar_t>(of, [&](const Tensor& logits, int64_t begin, int64_t end, bool is_last) {
      scalar_t* z = logits.mutable_data_ptr<scalar_t>();
      sums = sums + cross_entropy_rows<scalar_t>(z, labels + begin, weight_of<scalar_t>(of),
                                                 is_none ? losses + begin : nullptr, maximum + begin, sum + begin,
                                                 needs.any() ? z : nullptr, scale, end - begin, classes, options);
      if (needs.any()) {
        gradients.add(logits, begin, end, is_last);
      }
    });
    check_labels(op, sums.wrong == 0, labels, rows, classes, ignore_index);
    *total_weight.mutable_data_ptr<compute>() = compute(sums.weight);
    if (!is_none) {
      *losses = compute(options.reduction == Reduction::Mean ? sums.loss / sums.weight : sums.loss);
    }
    grads = gradients.results();
  });
  return std::tuple_cat(std::tuple{loss, lse, total_weight}, grads);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(
    const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& input, const Tensor& linear_weight,
    const std::optional<Tensor>& linear_bias, const Tensor& target, const std::optional<Tensor>& weight,
    const Tensor& lse, const Tensor& total_weight, const std::string& reduction, int64_t ignore_index,
    double label_smoothing, bool needs_grad_input, bool needs_grad_weight, bool needs_grad_bias) {
  constexpr const char* op = "_linear_cross_entropy_backward";
  const Options options{check_reduction(op, reduction), ignore_index, label_smoothing};
  kernels();
  check_linear_cross_entropy(op, input, linear_weight, linear_bias, target, weight, label_smoothing);
  check_computed(op, "total_weight", total_weight, {}, input);
  check_row_gradients(op, grad_output, grad_lse, input, lse, options.reduction, true);
  const Arguments of = contiguous_arguments(input, linear_weight, linear_bias, target, weight);
  const int64_t rows = input.size(0), classes = linear_weight.size(0);
  const int64_t* labels = of.target.const_data_ptr<int64_t>();
  std::tuple<Tensor, Tensor, Tensor> grads;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const Tensor statistics = as_contiguous(lse);
    const std::optional<Tensor> h = grad_lse ? std::optional(as_contiguous(*grad_lse)) : std::nullopt;
    const compute *maximum = statistics.const_data_ptr<compute>(), *sum = maximum + rows;
    const RowGradients<compute, compute> incoming =
        row_gradients<compute, compute>(grad_output, h, *total_weight.const_data_ptr<compute>(), options.reduction);
    Gradients<scalar_t> gradients(of, {needs_grad_input, needs_grad_weight, needs_grad_bias});
    bool are_right = true;
    for_each_chunk<scalar_t>(of, [&](const Tensor& logits, int64_t begin, int64_t end, bool is_last) {
      scalar_t* z = logits.mutable_data_ptr<scalar_t>();
      are_right &=
          cross_entropy_backward_rows<scalar_t>(incoming.from(begin), z, labels + begin, weight_of<scalar_t>(of),
                                                maximum + begin, sum + begin, z, end - begin, classes, options);
      gradients.add(logits, begin, end, is_last);
    });
    check_labels(op, are_right, labels, rows, classes, ignore_index);
    grads = gradients.results();
  });
  return grads;
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&torch_mlp::linear_cross_entropy_cpu));
  m.impl("_linear_cross_entropy_backward", TORCH_BOX(&torch_mlp::linear_cross_entropy_backward_cpu));
}

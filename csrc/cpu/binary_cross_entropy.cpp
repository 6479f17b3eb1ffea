// Binary cross-entropy of logits on the CPU.
//
//   forward     l_i  = w_i ((1 - y_i) softplus(x_i) + p_i y_i softplus(-x_i))      reduced by none, sum or mean
//   backward    gx_i = g_i w_i ((1 - y_i) sigmoid(x_i) - p_i y_i sigmoid(-x_i))
//               gy_i = g_i w_i (p_i softplus(-x_i) - softplus(x_i))
//
// Shapes: x and y (*), w (weight) and p (pos_weight) broadcast to it. How no digits are lost is in
// ../binary_cross_entropy.h. Fused: each direction is one sweep over x and y; weights are read as they repeat and not
// written out. The sweep over float and bfloat16 is in logistic.h; the other dtypes take plain loops. Threads: by
// blocks of adjacent elements. The loss is summed per block, then over the blocks; their number depends on the shape
// alone, so that the bits do not depend on the number of threads.
#include "../binary_cross_entropy.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <vector>

#include "dtypes.h"

namespace torch_mlp {
namespace {

constexpr int64_t kElementsPerThread = 1 << 17;  // that pay for waking a thread: 0.1 ms
// The blocks whose losses are summed: at most so many, of at least so many elements each.
constexpr int64_t kMaxSumBlocks = 64;
constexpr int64_t kMinSumElements = 1 << 12;
// Elements that repeat sooner are repeated up to here, so that the vector kernels get long runs.
constexpr int64_t kMinRun = 1 << 10;

// A tensor that is broadcast to the shape of input, or none.
template <typename scalar_t>
class Repeated {
 public:
  Repeated(const std::optional<Tensor>& self, const Tensor& input) {
    if (self && input.numel() > 0) {
      part_ = repeating_part(*self, input);
      data_ = part_.const_data_ptr<scalar_t>();
      period_ = part_.numel();
      if (period_ < std::min(kMinRun, input.numel())) {
        const int64_t times = ceil_div(std::min(kMinRun, input.numel()), period_);
        for (int64_t k = 0; k < times; ++k) {
          copies_.insert(copies_.end(), data_, data_ + period_);
        }
        data_ = copies_.data();
        period_ *= times;
      }
    }
  }
  Repeated(const Repeated&) = delete;

  // Where the elements from i on lie, and how many before they lie elsewhere.
  const scalar_t* at(int64_t i) const { return data_ ? data_ + i % period_ : nullptr; }
  int64_t run(int64_t i) const { return data_ ? period_ - i % period_ : std::numeric_limits<int64_t>::max(); }

 private:
  Tensor part_;
  std::vector<scalar_t> copies_;
  const scalar_t* data_ = nullptr;
  int64_t period_ = 0;
};

int64_t elements_of_block(int64_t count) { return std::max(ceil_div(count, kMaxSumBlocks), kMinSumElements); }

// Calls body(block, begin, end) for each block of elements, on several threads.
template <typename Body>
void for_each_block(int64_t count, const Body& body) {
  kernels();  // the first call may throw, which must not happen inside a parallel region
  const int64_t elements = elements_of_block(count);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / elements);
  torch::stable::parallel_for(0, ceil_div(count, elements), grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      body(block, block * elements, std::min((block + 1) * elements, count));
    }
  });
}

// Calls body(begin, count) for the runs of elements from begin to end in which nothing repeats.
template <typename Body, typename... Others>
void for_each_run(int64_t begin, int64_t end, const Body& body, const Others&... others) {
  while (begin < end) {
    const int64_t count = std::min({end - begin, others.run(begin)...});
    body(begin, count);
    begin += count;
  }
}

// As in kernels.h, whose kernels know float and bfloat16; plain loops for the others.
template <typename scalar_t>
double losses(const scalar_t* x, const scalar_t* y, const scalar_t* weight, const scalar_t* pos_weight, int64_t count,
              scalar_t* loss) {
  if constexpr (has_vector_kernels<scalar_t>) {
    return logistic_kernels<scalar_t>().loss({bits_of(x), bits_of(y), bits_of(weight), bits_of(pos_weight), count},
                                             bits_of(loss));
  } else {
    using compute = compute_t<scalar_t>;
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const compute value = (weight ? compute(weight[i]) : compute(1)) *
                            binary_cross_entropy(compute(x[i]), compute(y[i]), pos_weight ? compute(pos_weight[i]) : 1);
      sum += double(value);
      if (loss) {
        loss[i] = scalar_t(value);
      }
    }
    return sum;
  }
}

template <typename scalar_t>
void gradients(const scalar_t* x, const scalar_t* y, const scalar_t* weight, const scalar_t* pos_weight, int64_t count,
               const scalar_t* grad_output, compute_t<scalar_t> scale, scalar_t* grad_input, scalar_t* grad_target) {
  if constexpr (has_vector_kernels<scalar_t>) {
    logistic_kernels<scalar_t>().gradient({bits_of(x), bits_of(y), bits_of(weight), bits_of(pos_weight), count},
                                          bits_of(grad_output), scale, bits_of(grad_input), bits_of(grad_target));
  } else {
    using compute = compute_t<scalar_t>;
    const auto or_one = [](const scalar_t* from, int64_t i) { return from ? compute(from[i]) : compute(1); };
    for (int64_t i = 0; i < count; ++i) {
      const compute factor = scale * or_one(grad_output, i) * or_one(weight, i), p = or_one(pos_weight, i);
      if (grad_input) {
        grad_input[i] = scalar_t(factor * binary_cross_entropy_by_input(compute(x[i]), compute(y[i]), p));
      }
      if (grad_target) {
        grad_target[i] = scalar_t(factor * binary_cross_entropy_by_target(compute(x[i]), p));
      }
    }
  }
}

}  // namespace

// --- the ops ---

Tensor binary_cross_entropy_cpu(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& pos_weight, const std::string& reduction) {
  constexpr const char* op = "binary_cross_entropy_with_logits";
  const Reduction reduce = check_reduction(op, reduction);
  check_binary_cross_entropy(op, input, target, weight, pos_weight);
  const bool is_none = reduce == Reduction::None;
  const int64_t count = input.numel();
  const Tensor loss = empty(is_none ? sizes_of(input) : std::vector<int64_t>{}, input.scalar_type(), input);
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const Tensor x = as_contiguous(input), y = as_contiguous(target);
    const scalar_t *from_x = x.const_data_ptr<scalar_t>(), *from_y = y.const_data_ptr<scalar_t>();
    const Repeated<scalar_t> w(weight, input), p(pos_weight, input);
    scalar_t* to = loss.mutable_data_ptr<scalar_t>();
    std::array<double, kMaxSumBlocks> sums{};
    for_each_block(count, [&](int64_t block, int64_t begin, int64_t end) {
      const auto add_run = [&](int64_t i, int64_t run) {
        sums[block] += losses(from_x + i, from_y + i, w.at(i), p.at(i), run, is_none ? to + i : nullptr);
      };
      for_each_run(begin, end, add_run, w, p);
    });
    if (!is_none) {
      const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
      *to = scalar_t(reduce == Reduction::Mean ? sum / double(count) : sum);
    }
  });
  return loss;
}

std::tuple<Tensor, Tensor> binary_cross_entropy_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                             const Tensor& target, const std::optional<Tensor>& weight,
                                                             const std::optional<Tensor>& pos_weight,
                                                             const std::string& reduction, bool needs_grad_input,
                                                             bool needs_grad_target) {
  constexpr const char* op = "_binary_cross_entropy_with_logits_backward";
  const Reduction reduce = check_reduction(op, reduction);
  check_binary_cross_entropy_backward(op, grad_output, input, target, weight, pos_weight, reduce);
  const bool is_none = reduce == Reduction::None;
  const int64_t count = input.numel();
  const ScalarType dtype = input.scalar_type();
  const Tensor grad_input = empty(needs_grad_input ? sizes_of(input) : std::vector<int64_t>{0}, dtype, input);
  const Tensor grad_target = empty(needs_grad_target ? sizes_of(input) : std::vector<int64_t>{0}, dtype, input);
  dispatch_floating(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const Tensor x = as_contiguous(input), y = as_contiguous(target);
    const scalar_t *from_x = x.const_data_ptr<scalar_t>(), *from_y = y.const_data_ptr<scalar_t>();
    const Repeated<scalar_t> w(weight, input), p(pos_weight, input);
    const Repeated<scalar_t> g(is_none ? std::optional(grad_output) : std::nullopt, input);
    const double scale =
        is_none ? 1.0
                : double(*grad_output.const_data_ptr<scalar_t>()) / (reduce == Reduction::Mean ? double(count) : 1.0);
    scalar_t* to_input = needs_grad_input ? grad_input.mutable_data_ptr<scalar_t>() : nullptr;
    scalar_t* to_target = needs_grad_target ? grad_target.mutable_data_ptr<scalar_t>() : nullptr;
    for_each_block(count, [&](int64_t, int64_t begin, int64_t end) {
      const auto write_run = [&](int64_t i, int64_t run) {
        gradients(from_x + i, from_y + i, w.at(i), p.at(i), run, g.at(i), compute_t<scalar_t>(scale),
                  to_input ? to_input + i : nullptr, to_target ? to_target + i : nullptr);
      };
      for_each_run(begin, end, write_run, w, p, g);
    });
  });
  return {grad_input, grad_target};
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CPU, m) {
  m.impl("binary_cross_entropy_with_logits", TORCH_BOX(&torch_mlp::binary_cross_entropy_cpu));
  m.impl("_binary_cross_entropy_with_logits_backward", TORCH_BOX(&torch_mlp::binary_cross_entropy_backward_cpu));
}

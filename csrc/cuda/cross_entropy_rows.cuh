// The work of the softmax cross-entropy ops on CUDA, on contiguous rows of logits in memory: what cross_entropy.cu and
// linear_cross_entropy.cu are made of. The formulas are in the former.
//
// Threads: 4 threads a row for few classes, else a warp, else a block. A block adds its rows' losses and weights, and
// one block adds these sums; the split depends on the shape alone, so that the bits are the same in every run.
#pragma once

#include <cmath>

#include "common.cuh"
#include "softmax.cuh"

namespace torch_mlp {
namespace {

// In double, as are the few operations done once for a row: only the work on each element is worth rounding for speed.
struct Options {
  int64_t ignore_index;
  double at_label;   // 1 - e
  double per_class;  // e / C
};

// sum_c w_c (m - x_c)
template <int lanes, typename scalar_t, typename compute = compute_t<scalar_t>>
__device__ double row_smoothing(const scalar_t* x, int64_t phase, const scalar_t* weight, int64_t classes, int lane,
                                compute maximum) {
  double sum = 0;
  for_each_pack<scalar_t>(phase, classes, lane, lanes, [&](auto at) {
    const auto pack = load(x, at);
#pragma unroll
    for (int j = 0; j < at.width; ++j) {
      const double distance = double(maximum) - double(compute(pack.values[j]));
      sum += weight ? double(compute(weight[at.first() + j])) * distance : distance;
    }
  });
  return lanes_reduce<lanes>(sum, Add{});
}

// The gradient of a row whose loss counts scale times, and its lse of_lse times. maximum and sum are those of
// row_softmax; phase is that of x and grad, negative where they differ.
template <int lanes, typename scalar_t, typename compute = compute_t<scalar_t>>
__device__ void row_gradient(const scalar_t* x, scalar_t* grad, int64_t phase, int64_t classes, int lane, int64_t label,
                             compute maximum, compute sum, double scale, double of_lse, const scalar_t* weight,
                             double sum_of_weights, const Options& options) {
  const double label_weight = weight ? double(compute(weight[label])) : 1.0;
  const double row_weight = options.at_label * label_weight;
  const compute of_exp = compute((scale * (row_weight + options.per_class * sum_of_weights) + of_lse) / double(sum));
  const bool is_smoothed = options.per_class > 0;
  const compute of_weight = compute(is_smoothed ? scale * options.per_class : 0.0);
  // The target's own: here digits cancel as p nears 1, and one class alone must give exactly 0. Of a scale of inf torch
  // subtracts inf from inf.
  const double p = std::exp(double(compute(x[label])) - double(maximum)) / double(sum);
  const double of_smoothing = is_smoothed ? options.per_class * (sum_of_weights * p - label_weight) : 0.0;
  const compute at_label = compute(scale * (row_weight * (p - 1) + of_smoothing) + of_lse * p + (scale - scale));
  const scalar_t* class_weight = is_smoothed ? weight : nullptr;
  for_each_pack<scalar_t>(phase, classes, lane, lanes, [&](auto at) {
    auto pack = load(x, at);
#pragma unroll
    for (int j = 0; j < at.width; ++j) {
      const compute offset = class_weight ? of_weight * compute(class_weight[at.first() + j]) : of_weight;
      const compute value = of_exp * exp_of<scalar_t>(compute(pack.values[j]) - maximum) - offset;
      pack.values[j] = at.first() + j == label ? at_label : value;
    }
    store_streaming(grad, at, pack);
  });
}

template <int lanes, typename scalar_t>
__device__ void zero_row(scalar_t* grad, int64_t phase, int64_t classes, int lane) {
  for_each_pack<scalar_t>(phase, classes, lane, lanes,
                          [&](auto at) { store_streaming(grad, at, Pack<scalar_t, at.width>{}); });
}

// One block: sum_k w_k.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) weight_sum_kernel(const scalar_t* __restrict__ weight, int phase,
                                                              double* __restrict__ weight_sum, int64_t classes) {
  double sum = 0;
  for_each_pack<scalar_t>(phase, classes, threadIdx.x, kThreads, [&](auto at) {
    for (const auto& value : load(weight, at).values) {
      sum += double(compute_t<scalar_t>(value));
    }
  });
  sum = block_reduce(sum, Add{});
  if (threadIdx.x == 0) {
    *weight_sum = sum;
  }
}

// Writes each row's maximum and sum, its loss unless that is null, and the block's sums of losses and of label weights,
// side by side; and with_gradient, while the row is in the cache, its gradient for a grad_output of 1, over the divisor
// unless that is null. weight_sum is null where no class weights are given, or no smoothing needs their sum. phase is
// that of input, grad_phase that of both, negative where they differ.
template <int lanes, bool with_gradient, typename scalar_t, typename loss_t>
__global__ void __launch_bounds__(block_threads(lanes), kMinBlocks<scalar_t>* kThreads / block_threads(lanes))
    cross_entropy_kernel(const scalar_t* __restrict__ input, int phase, const int64_t* __restrict__ target,
                         const scalar_t* __restrict__ weight, const double* __restrict__ weight_sum,
                         loss_t* __restrict__ loss, compute_t<scalar_t>* __restrict__ maxima,
                         compute_t<scalar_t>* __restrict__ sums, const compute_t<scalar_t>* __restrict__ divisor,
                         scalar_t* __restrict__ grad_input, int grad_phase, double* __restrict__ partials, int64_t rows,
                         int64_t classes, Options options) {
  using compute = compute_t<scalar_t>;
  constexpr int threads = block_threads(lanes), block_rows = threads / lanes;
  const int lane = threadIdx.x % lanes;
  const double sum_of_weights = weight_sum ? *weight_sum : double(classes);
  double block_loss = 0, block_weight = 0;
  for (int64_t begin = int64_t(blockIdx.x) * block_rows; begin < rows; begin += int64_t(gridDim.x) * block_rows) {
    const int64_t i = begin + threadIdx.x / lanes;
    // Threads past the last row have no element, but take part in the reductions of their warp.
    const bool is_row = i < rows;
    const scalar_t* x = input + i * classes;
    const int64_t label = is_row ? target[i] : options.ignore_index;
    const bool counts = label != options.ignore_index;

    compute maximum, sum;
    row_softmax<lanes>(x, phase + i * classes, is_row ? classes : 0, lane, maximum, sum);
    CUDA_KERNEL_ASSERT((!counts || (label >= 0 && label < classes)) && "expected target in [0, num_classes)");
    const double log_sum = std::log(double(sum));
    double row_loss = 0, row_weight = 0;
    if (options.per_class > 0) {
      const double smoothing =
          row_smoothing<lanes>(x, phase + i * classes, weight, counts ? classes : 0, lane, maximum);
      row_loss = counts ? options.per_class * (sum_of_weights * log_sum + smoothing) : 0.0;
    }
    if (is_row && lane == 0) {
      maxima[i] = maximum;
      sums[i] = sum;
      if (counts) {
        row_weight = weight ? double(compute(weight[label])) : 1.0;
        row_loss += options.at_label * row_weight * (log_sum + (double(maximum) - double(compute(x[label]))));
      }
      if (loss) {
        loss[i] = static_cast<loss_t>(compute(row_loss));
      }
      block_loss += row_loss;
      block_weight += row_weight;
    }
    if constexpr (with_gradient) {
      scalar_t* grad = grad_input + i * classes;
      const int64_t row_phase = grad_phase < 0 ? grad_phase : grad_phase + i * classes;
      if (counts) {
        row_gradient<lanes>(x, grad, row_phase, classes, lane, label, maximum, sum,
                            divisor ? 1 / double(*divisor) : 1.0, 0.0, weight, sum_of_weights, options);
      } else if (is_row) {
        zero_row<lanes>(grad, row_phase, classes, lane);
      }
    }
  }
  block_loss = block_reduce<threads>(block_loss, Add{});
  block_weight = block_reduce<threads>(block_weight, Add{});
  if (threadIdx.x == 0) {
    partials[2 * int64_t(blockIdx.x)] = block_loss;
    partials[2 * int64_t(blockIdx.x) + 1] = block_weight;
  }
}

// What a target adds to the divisor of the mean. A wrong one adds nothing here, and is found where its loss is
// computed.
template <typename scalar_t>
__device__ double target_weight(int64_t label, const scalar_t* weight, int64_t classes, int64_t ignore_index) {
  const bool counts = label != ignore_index && label >= 0 && label < classes;
  return !counts ? 0.0 : weight ? double(compute_t<scalar_t>(weight[label])) : 1.0;
}

// A block's sum of the weights of its targets, as a partial sum for sum_losses beside a loss of 0.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    target_weight_kernel(const int64_t* __restrict__ target, const scalar_t* __restrict__ weight,
                         double* __restrict__ partials, int64_t rows, int64_t classes, int64_t ignore_index) {
  double sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rows; i += int64_t(gridDim.x) * kThreads) {
    sum += target_weight(target[i], weight, classes, ignore_index);
  }
  sum = block_reduce(sum, Add{});
  if (threadIdx.x == 0) {
    partials[2 * int64_t(blockIdx.x)] = 0;
    partials[2 * int64_t(blockIdx.x) + 1] = sum;
  }
}

// One block: total_weight, and the reduced loss unless loss is null.
template <typename loss_t>
__global__ void __launch_bounds__(kThreads)
    loss_sum_kernel(const double* __restrict__ partials, loss_t* __restrict__ loss,
                    compute_t<loss_t>* __restrict__ total_weight, int64_t blocks, bool is_mean) {
  double loss_sum = 0, label_weight = 0;
#pragma unroll 4
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) {
    loss_sum += partials[2 * block];
    label_weight += partials[2 * block + 1];
  }
  loss_sum = block_reduce(loss_sum, Add{});
  label_weight = block_reduce(label_weight, Add{});
  if (threadIdx.x == 0) {
    *total_weight = static_cast<compute_t<loss_t>>(label_weight);
    if (loss) {
      *loss = static_cast<loss_t>(is_mean ? loss_sum / label_weight : loss_sum);
    }
  }
}

// grad_output, grad_stride, divisor and grad_lse are RowGradients; phase is that of input and grad_input, negative
// where they differ. Where holds_one, grad_input holds the gradient for a grad_output of 1.
template <int lanes, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks<scalar_t>)
    cross_entropy_backward_kernel(const grad_t* __restrict__ grad_output, int64_t grad_stride,
                                  const compute_t<scalar_t>* __restrict__ divisor,
                                  const compute_t<scalar_t>* __restrict__ grad_lse, const scalar_t* __restrict__ input,
                                  int phase, const int64_t* __restrict__ target, const scalar_t* __restrict__ weight,
                                  const double* __restrict__ weight_sum, const compute_t<scalar_t>* __restrict__ maxima,
                                  const compute_t<scalar_t>* __restrict__ sums, scalar_t* __restrict__ grad_input,
                                  int64_t rows, int64_t classes, bool holds_one, Options options) {
  using compute = compute_t<scalar_t>;
  constexpr int block_rows = kThreads / lanes;
  if (holds_one && compute(*grad_output) == 1) {
    return;
  }
  const int lane = threadIdx.x % lanes;
  const double sum_of_weights = weight_sum ? *weight_sum : double(classes);

  for (int64_t i = int64_t(blockIdx.x) * block_rows + threadIdx.x / lanes; i < rows;
       i += int64_t(gridDim.x) * block_rows) {
    const int64_t label = target[i], row_phase = phase < 0 ? phase : phase + i * classes;
    if (label == options.ignore_index) {
      zero_row<lanes>(grad_input + i * classes, row_phase, classes, lane);
      continue;
    }
    CUDA_KERNEL_ASSERT(label >= 0 && label < classes && "expected target in [0, num_classes)");
    const double incoming = grad_output ? double(compute(grad_output[i * grad_stride])) : 1.0;
    row_gradient<lanes>(input + i * classes, grad_input + i * classes, row_phase, classes, lane, label, maxima[i],
                        sums[i], incoming / (divisor ? double(*divisor) : 1.0), grad_lse ? double(grad_lse[i]) : 0.0,
                        weight, sum_of_weights, options);
  }
}

// --- the host's side ---

// A null pointer for no tensor.
template <typename T>
const T* data_of(const std::optional<Tensor>& self) {
  return self ? self->const_data_ptr<T>() : nullptr;
}

Options options_of(int64_t ignore_index, double label_smoothing, int64_t classes) {
  return {ignore_index, 1 - label_smoothing, label_smoothing / double(std::max<int64_t>(1, classes))};
}

// sum_k w_k where class weights are given and smoothing needs it.
template <typename scalar_t>
std::optional<Tensor> sum_of_weights(const std::optional<Tensor>& weight, double label_smoothing) {
  if (!weight || label_smoothing == 0) {
    return std::nullopt;
  }
  const Tensor sum = empty({}, ScalarType::Double, *weight);
  const scalar_t* w = weight->const_data_ptr<scalar_t>();
  weight_sum_kernel<scalar_t>
      <<<1, kThreads, 0, current_stream(*weight)>>>(w, phase_of(w), sum.mutable_data_ptr<double>(), weight->numel());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return sum;
}

// The phase of both, or -1 where they differ.
template <typename scalar_t>
int common_phase_of(const scalar_t* a, const scalar_t* b) {
  return phase_of(a) == phase_of(b) ? phase_of(a) : -1;
}

// Writes each row's maximum and sum, its loss unless that is null, for each block two partial sums for sum_losses, and
// unless grad_input is null its gradient for a grad_output of 1, over the divisor unless that is null.
template <typename scalar_t, typename loss_t>
void cross_entropy_rows(const scalar_t* input, const int64_t* target, const scalar_t* weight, const double* weight_sum,
                        loss_t* loss, compute_t<scalar_t>* maximum, compute_t<scalar_t>* sum, double* partials,
                        unsigned int blocks, int64_t rows, int64_t classes, const Options& options, cudaStream_t stream,
                        const compute_t<scalar_t>* divisor = nullptr, scalar_t* grad_input = nullptr) {
  const auto launch = [&](auto lanes, auto with_gradient) {
    cross_entropy_kernel<lanes.value, with_gradient.value><<<blocks, block_threads(lanes.value), 0, stream>>>(
        input, phase_of(input), target, weight, weight_sum, loss, maximum, sum, divisor, grad_input,
        common_phase_of<scalar_t>(input, grad_input), partials, rows, classes, options);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (grad_input) {
    dispatch_lanes_of_cached_rows<scalar_t>(classes, [&](auto lanes) { launch(lanes, std::true_type{}); });
  } else {
    dispatch_lanes(classes, [&](auto lanes) { launch(lanes, std::false_type{}); });
  }
}

// The total weight, and the reduced loss unless that is null, from the partial sums of all blocks.
template <typename loss_t>
void sum_losses(const Tensor& partials, loss_t* loss, compute_t<loss_t>* total_weight, bool is_mean,
                cudaStream_t stream) {
  loss_sum_kernel<<<1, kThreads, 0, stream>>>(partials.const_data_ptr<double>(), loss, total_weight,
                                              partials.numel() / 2, is_mean);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The sum of the weights of the targets, which gradients need before the loss of all rows is there.
template <typename scalar_t>
Tensor total_weight_of(const Tensor& target, const std::optional<Tensor>& weight, int64_t classes,
                       int64_t ignore_index) {
  using compute = compute_t<scalar_t>;
  const cudaStream_t stream = current_stream(target);
  const int64_t rows = target.numel();
  const unsigned int blocks = blocks_of(rows, kThreads, kMaxSumBlocks);
  const Tensor partials = empty({blocks, 2}, ScalarType::Double, target);
  Tensor total_weight = empty({}, torch::headeronly::CppTypeToScalarType<compute>::value, target);
  target_weight_kernel<scalar_t>
      <<<blocks, kThreads, 0, stream>>>(target.const_data_ptr<int64_t>(), data_of<scalar_t>(weight),
                                        partials.mutable_data_ptr<double>(), rows, classes, ignore_index);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sum_losses<compute>(partials, nullptr, total_weight.mutable_data_ptr<compute>(), false, stream);
  return total_weight;
}

// What comes in for the backward pass: a gradient for each row, or one for all where stride is 0, or null, which stands
// for 1; the total weight of the mean, else null; and, or null, a gradient for the lse of each row.
template <typename grad_t, typename compute>
struct RowGradients {
  const grad_t* of_rows;
  int64_t stride;
  const compute* divisor;
  const compute* of_lse;

  // Those of the rows from begin on.
  RowGradients from(int64_t begin) const {
    return {of_rows ? of_rows + begin * stride : nullptr, stride, divisor, of_lse ? of_lse + begin : nullptr};
  }
};

template <typename grad_t, typename compute>
RowGradients<grad_t, compute> row_gradients(const Tensor& grad_output, const std::optional<Tensor>& grad_lse,
                                            const Tensor& total_weight, Reduction reduction) {
  return {grad_output.const_data_ptr<grad_t>(), grad_output.dim() ? grad_output.stride(0) : 0,
          reduction == Reduction::Mean ? total_weight.const_data_ptr<compute>() : nullptr, data_of<compute>(grad_lse)};
}

// The gradient of the logits, which must not take their place. Where holds_one, it is there for a grad_output of 1, and
// nothing is done if that is what comes in.
template <typename scalar_t, typename grad_t>
void cross_entropy_backward_rows(const RowGradients<grad_t, compute_t<scalar_t>>& incoming, const scalar_t* input,
                                 const int64_t* target, const scalar_t* weight, const double* weight_sum,
                                 const compute_t<scalar_t>* maximum, const compute_t<scalar_t>* sum,
                                 scalar_t* grad_input, int64_t rows, int64_t classes, const Options& options,
                                 cudaStream_t stream, bool holds_one = false) {
  if (rows == 0 || classes == 0) {
    return;
  }
  const int phase = common_phase_of<scalar_t>(input, grad_input);
  const int64_t most_blocks = holds_one ? kMaxSumBlocks : kMaxBlocks;  // blocks that have nothing to do take time too
  dispatch_lanes(classes, [&](auto lanes) {
    const unsigned int blocks = blocks_of(rows, kThreads / lanes.value, most_blocks);
    cross_entropy_backward_kernel<lanes.value><<<blocks, kThreads, 0, stream>>>(
        incoming.of_rows, incoming.stride, incoming.divisor, incoming.of_lse, input, phase, target, weight, weight_sum,
        maximum, sum, grad_input, rows, classes, holds_one, options);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace
}  // namespace torch_mlp

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
// Threads: 4 threads a row for few classes, else a warp, else a block. A block adds its rows' losses and weights, and
// one block adds these sums; the split depends on the shape alone, so that the bits are the same in every run.
#include <cmath>

#include "../cross_entropy.h"
#include "common.cuh"
#include "softmax.cuh"

namespace torch_mlp {
namespace {

// Up to so many classes a row belongs to 4 threads, or to a warp.
constexpr int64_t kNarrowClasses = 128;
constexpr int64_t kWarpClasses = 1024;

// The partial sums of the loss: at most this many. A few times the blocks that a large device holds at once, so that
// none waits long for the last.
constexpr int64_t kMaxSumBlocks = 4096;

// The blocks that a multiprocessor has to hold at once. Left to itself, the compiler would save so many registers for
// more of them that it spills.
template <typename scalar_t>
constexpr int kMinBlocks = std::is_same_v<scalar_t, double> ? 2 : 4;

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

// Writes lse, the loss of each row unless loss is null, and the block's sums of losses and of label weights. weight_sum
// is null where no class weights are given, or no smoothing needs their sum. phase is that of input.
template <int lanes, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks<scalar_t>)
    cross_entropy_kernel(const scalar_t* __restrict__ input, int phase, const int64_t* __restrict__ target,
                         const scalar_t* __restrict__ weight, const double* __restrict__ weight_sum,
                         scalar_t* __restrict__ loss, compute_t<scalar_t>* __restrict__ lse,
                         double* __restrict__ partials, int64_t rows, int64_t classes, Options options) {
  using compute = compute_t<scalar_t>;
  constexpr int block_rows = kThreads / lanes;
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
      lse[i] = maximum;
      lse[rows + i] = sum;
      if (counts) {
        row_weight = weight ? double(compute(weight[label])) : 1.0;
        row_loss += options.at_label * row_weight * (log_sum + (double(maximum) - double(compute(x[label]))));
      }
      if (loss) {
        loss[i] = static_cast<scalar_t>(compute(row_loss));
      }
      block_loss += row_loss;
      block_weight += row_weight;
    }
  }
  block_loss = block_reduce(block_loss, Add{});
  block_weight = block_reduce(block_weight, Add{});
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = block_loss;
    partials[gridDim.x + blockIdx.x] = block_weight;
  }
}

// One block: total_weight, and the reduced loss unless loss is null.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    loss_sum_kernel(const double* __restrict__ partials, scalar_t* __restrict__ loss,
                    compute_t<scalar_t>* __restrict__ total_weight, int64_t blocks, bool is_mean) {
  double loss_sum = 0, label_weight = 0;
#pragma unroll 4
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) {
    loss_sum += partials[block];
    label_weight += partials[blocks + block];
  }
  loss_sum = block_reduce(loss_sum, Add{});
  label_weight = block_reduce(label_weight, Add{});
  if (threadIdx.x == 0) {
    *total_weight = static_cast<compute_t<scalar_t>>(label_weight);
    if (loss) {
      *loss = static_cast<scalar_t>(is_mean ? loss_sum / label_weight : loss_sum);
    }
  }
}

// grad_stride is 0 where one gradient serves all rows; divisor is the total weight of the mean, else null; grad_lse is
// null where none comes in; phase is that of input and grad_input, negative where they differ.
template <int lanes, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks<scalar_t>)
    cross_entropy_backward_kernel(const scalar_t* __restrict__ grad_output, int64_t grad_stride,
                                  const compute_t<scalar_t>* __restrict__ divisor,
                                  const compute_t<scalar_t>* __restrict__ grad_lse, const scalar_t* __restrict__ input,
                                  int phase, const int64_t* __restrict__ target, const scalar_t* __restrict__ weight,
                                  const double* __restrict__ weight_sum, const compute_t<scalar_t>* __restrict__ lse,
                                  scalar_t* __restrict__ grad_input, int64_t rows, int64_t classes, Options options) {
  using compute = compute_t<scalar_t>;
  constexpr int block_rows = kThreads / lanes;
  const int lane = threadIdx.x % lanes;
  const double sum_of_weights = weight_sum ? *weight_sum : double(classes);

  for (int64_t i = int64_t(blockIdx.x) * block_rows + threadIdx.x / lanes; i < rows;
       i += int64_t(gridDim.x) * block_rows) {
    const scalar_t* x = input + i * classes;
    scalar_t* grad = grad_input + i * classes;
    const int64_t label = target[i], row_phase = phase < 0 ? phase : phase + i * classes;
    if (label == options.ignore_index) {
      for_each_pack<scalar_t>(row_phase, classes, lane, lanes,
                              [&](auto at) { store(grad, at, Pack<scalar_t, at.width>{}); });
      continue;
    }
    CUDA_KERNEL_ASSERT(label >= 0 && label < classes && "expected target in [0, num_classes)");
    const double scale = double(compute(grad_output[i * grad_stride])) / (divisor ? double(*divisor) : 1.0);
    const double label_weight = weight ? double(compute(weight[label])) : 1.0;
    const double row_weight = options.at_label * label_weight;
    const compute maximum = lse[i], sum = lse[rows + i];
    const double of_lse = grad_lse ? double(grad_lse[i]) : 0.0;
    const compute of_exp = compute((scale * (row_weight + options.per_class * sum_of_weights) + of_lse) / double(sum));
    const compute of_weight = compute(scale * options.per_class);
    // The target's own: here digits cancel as p nears 1, and one class alone must give exactly 0.
    const double p = std::exp(double(compute(x[label])) - double(maximum)) / double(sum);
    const compute at_label =
        compute(scale * (row_weight * (p - 1) + options.per_class * (sum_of_weights * p - label_weight)) + of_lse * p);
    const scalar_t* class_weight = options.per_class > 0 ? weight : nullptr;
    for_each_pack<scalar_t>(row_phase, classes, lane, lanes, [&](auto at) {
      auto pack = load(x, at);
#pragma unroll
      for (int j = 0; j < at.width; ++j) {
        const compute offset = class_weight ? of_weight * compute(class_weight[at.first() + j]) : of_weight;
        const compute value = of_exp * std::exp(compute(pack.values[j]) - maximum) - offset;
        pack.values[j] = at.first() + j == label ? at_label : value;
      }
      store(grad, at, pack);
    });
  }
}

// Calls launch with the number of threads that share a row, a compile-time constant.
template <typename Launch>
void dispatch_lanes(int64_t classes, const Launch& launch) {
  if (classes <= kNarrowClasses) {
    launch(std::integral_constant<int, 4>{});
  } else if (classes <= kWarpClasses) {
    launch(std::integral_constant<int, kWarpThreads>{});
  } else {
    launch(std::integral_constant<int, kThreads>{});
  }
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

// A null pointer for no tensor.
template <typename T>
const T* data_of(const std::optional<Tensor>& self) {
  return self ? self->const_data_ptr<T>() : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cuda(const Tensor& input, const Tensor& target,
                                                      const std::optional<Tensor>& weight, const std::string& reduction,
                                                      int64_t ignore_index, double label_smoothing) {
  constexpr const char* op = "cross_entropy";
  const Reduction reduce = check_reduction(op, reduction);
  check_cross_entropy(op, input, target, weight, label_smoothing);
  const DeviceGuard guard(input.get_device_index());
  const int64_t rows = input.size(0), classes = input.size(1);
  const Tensor x = as_contiguous(input), y = as_contiguous(target);
  const std::optional<Tensor> w = weight ? std::optional(as_contiguous(*weight)) : std::nullopt;

  Tensor loss, lse, total_weight;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const ScalarType compute_dtype = torch::headeronly::CppTypeToScalarType<compute>::value;
    const bool is_none = reduce == Reduction::None;
    loss = empty(is_none ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, input.scalar_type(), input);
    lse = empty({2, rows}, compute_dtype, input);
    total_weight = empty({}, compute_dtype, input);
    const scalar_t* logits = x.const_data_ptr<scalar_t>();
    scalar_t* losses = loss.mutable_data_ptr<scalar_t>();
    const std::optional<Tensor> weight_sum = sum_of_weights<scalar_t>(w, label_smoothing);
    const cudaStream_t stream = current_stream(input);
    dispatch_lanes(classes, [&](auto lanes) {
      const int64_t blocks = std::min(ceil_div(rows, kThreads / lanes.value), kMaxSumBlocks);
      const Tensor partials = empty({2, blocks}, ScalarType::Double, input);
      if (rows > 0) {
        cross_entropy_kernel<lanes.value, scalar_t><<<grid_of(blocks), kThreads, 0, stream>>>(
            logits, phase_of(logits), y.const_data_ptr<int64_t>(), data_of<scalar_t>(w), data_of<double>(weight_sum),
            is_none ? losses : nullptr, lse.mutable_data_ptr<compute>(), partials.mutable_data_ptr<double>(), rows,
            classes, options_of(ignore_index, label_smoothing, classes));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      loss_sum_kernel<scalar_t>
          <<<1, kThreads, 0, stream>>>(partials.const_data_ptr<double>(), is_none ? nullptr : losses,
                                       total_weight.mutable_data_ptr<compute>(), blocks, reduce == Reduction::Mean);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {loss, lse, total_weight};
}

Tensor cross_entropy_backward_cuda(const Tensor& grad_output, const std::optional<Tensor>& grad_lse,
                                   const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                   const Tensor& lse, const Tensor& total_weight, const std::string& reduction,
                                   int64_t ignore_index, double label_smoothing) {
  constexpr const char* op = "_cross_entropy_backward";
  const Reduction reduce = check_reduction(op, reduction);
  check_cross_entropy_backward(op, grad_output, grad_lse, input, target, weight, lse, total_weight, reduce,
                               label_smoothing);
  const DeviceGuard guard(input.get_device_index());
  const int64_t rows = input.size(0), classes = input.size(1);
  Tensor grad_input = empty(sizes_of(input), input.scalar_type(), input);
  if (grad_input.numel() == 0) {
    return grad_input;
  }
  const Tensor x = as_contiguous(input), y = as_contiguous(target);
  const Tensor statistics = as_contiguous(lse);
  const std::optional<Tensor> h = grad_lse ? std::optional(as_contiguous(*grad_lse)) : std::nullopt;
  const std::optional<Tensor> w = weight ? std::optional(as_contiguous(*weight)) : std::nullopt;

  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const scalar_t* logits = x.const_data_ptr<scalar_t>();
    scalar_t* grads = grad_input.mutable_data_ptr<scalar_t>();
    const std::optional<Tensor> weight_sum = sum_of_weights<scalar_t>(w, label_smoothing);
    dispatch_lanes(classes, [&](auto lanes) {
      const int64_t blocks = ceil_div(rows, kThreads / lanes.value);
      cross_entropy_backward_kernel<lanes.value, scalar_t><<<grid_of(blocks), kThreads, 0, current_stream(input)>>>(
          grad_output.const_data_ptr<scalar_t>(), grad_output.dim() ? grad_output.stride(0) : 0,
          reduce == Reduction::Mean ? total_weight.const_data_ptr<compute>() : nullptr, data_of<compute>(h), logits,
          phase_of(logits) == phase_of(grads) ? phase_of(grads) : -1, y.const_data_ptr<int64_t>(), data_of<scalar_t>(w),
          data_of<double>(weight_sum), statistics.const_data_ptr<compute>(), grads, rows, classes,
          options_of(ignore_index, label_smoothing, classes));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return grad_input;
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&torch_mlp::cross_entropy_cuda));
  m.impl("_cross_entropy_backward", TORCH_BOX(&torch_mlp::cross_entropy_backward_cuda));
}

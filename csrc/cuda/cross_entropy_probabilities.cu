// Softmax cross-entropy with a number for each class as target, its probability mostly, on CUDA.
//
//   lse = log(sum_c exp(x_c)) = m + log(s), kept as m and s (cross_entropy.cu says why)      p = exp(x - m) / s
//   forward     l_i  = sum_c t_c (lse - x_c)      reduced by none, sum, or mean = sum_i l_i / batch
//   backward    gx_c = g_i (p_c sum_k t_k - t_c) + h_i p_c      gt_c = g_i (lse - x_c)
//
// Shapes: x and t (batch, num_classes), lse (2, batch) = (m, s); h is the gradient of lse. Class weights and label
// smoothing are in t already.
// Fused: softmax in one sweep over a row, the loss in a second one, from cache; the gradients in one sweep after one
// that sums t; p never stored. Threads: a few a row for few classes, a warp, or a block; each block adds the losses of
// its rows, and one block those sums, in an order that the shape alone decides.
#include <cmath>

#include "common.cuh"
#include "softmax.cuh"

namespace torch_mlp {
namespace {

// Rows are read through packs only where input and target lie alike.
int phase_of_both(int one, int other) { return one == other ? one : -1; }

// Writes each row's maximum and sum, its loss unless that is null, and the sum of the block's losses.
template <int lanes, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks<scalar_t>)
    probabilities_kernel(const scalar_t* __restrict__ input, const scalar_t* __restrict__ target, int phase,
                         scalar_t* __restrict__ loss, double* __restrict__ partials,
                         compute_t<scalar_t>* __restrict__ lse, int64_t rows, int64_t classes) {
  using compute = compute_t<scalar_t>;
  constexpr int block_rows = kThreads / lanes;
  const int lane = threadIdx.x % lanes;
  double block_loss = 0;
  for (int64_t begin = int64_t(blockIdx.x) * block_rows; begin < rows; begin += int64_t(gridDim.x) * block_rows) {
    const int64_t i = begin + threadIdx.x / lanes;
    // Threads past the last row have no element, but take part in the reductions of their warp.
    const bool is_row = i < rows;
    const int64_t row_phase = phase < 0 ? phase : phase + i * classes, count = is_row ? classes : 0;
    const scalar_t *x = input + i * classes, *t = target + i * classes;
    compute maximum, sum;
    row_softmax<lanes>(x, row_phase, count, lane, maximum, sum);
    double of_targets = 0, deficit = 0;
    for_each_pack<scalar_t>(row_phase, count, lane, lanes, [&](auto at) {
      const auto logits = load(x, at), weights = load(t, at);
#pragma unroll
      for (int j = 0; j < at.width; ++j) {
        const double weight = double(compute(weights.values[j]));
        of_targets += weight;
        deficit += weight * (double(maximum) - double(compute(logits.values[j])));
      }
    });
    of_targets = lanes_reduce<lanes>(of_targets, Add{});
    deficit = lanes_reduce<lanes>(deficit, Add{});
    if (is_row && lane == 0) {
      const double row_loss = classes == 0 ? 0 : of_targets * std::log(double(sum)) + deficit;
      lse[i] = maximum;
      lse[rows + i] = sum;
      block_loss += row_loss;
      if (loss) {
        loss[i] = static_cast<scalar_t>(compute(row_loss));
      }
    }
  }
  block_loss = block_reduce(block_loss, Add{});
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = block_loss;
  }
}

// grad_stride is 0 where one gradient serves all rows; grad_lse, grad_input and grad_target are null where they are not
// there or not wanted; phase is that of all tensors, negative where they differ.
template <int lanes, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks<scalar_t>)
    probabilities_backward_kernel(const scalar_t* __restrict__ grad_output, int64_t grad_stride, double divisor,
                                  const compute_t<scalar_t>* __restrict__ grad_lse, const scalar_t* __restrict__ input,
                                  const scalar_t* __restrict__ target, int phase,
                                  const compute_t<scalar_t>* __restrict__ lse, scalar_t* __restrict__ grad_input,
                                  scalar_t* __restrict__ grad_target, int64_t rows, int64_t classes) {
  using compute = compute_t<scalar_t>;
  constexpr int block_rows = kThreads / lanes;
  const int lane = threadIdx.x % lanes;
  for (int64_t begin = int64_t(blockIdx.x) * block_rows; begin < rows; begin += int64_t(gridDim.x) * block_rows) {
    const int64_t i = begin + threadIdx.x / lanes;
    const bool is_row = i < rows;
    const int64_t row_phase = phase < 0 ? phase : phase + i * classes, count = is_row ? classes : 0;
    const scalar_t *x = input + i * classes, *t = target + i * classes;
    double of_targets = 0;
    for_each_pack<scalar_t>(row_phase, count, lane, lanes, [&](auto at) {
      for (const auto& value : load(t, at).values) {
        of_targets += double(compute(value));
      }
    });
    of_targets = lanes_reduce<lanes>(of_targets, Add{});
    if (!is_row) {
      continue;
    }
    const double scale = double(compute(grad_output[i * grad_stride])) / divisor;
    const compute maximum = lse[i], sum = lse[rows + i], log_sum = compute(std::log(double(sum)));
    const compute of_lse = grad_lse ? grad_lse[i] : compute(0);
    // One class alone must get exactly the gradient of lse: what is taken off the others is 0 for it, or NaN.
    const bool is_alone = classes == 1;
    const double of_softmax = is_alone ? of_targets - of_targets : of_targets;
    const compute of_exp = compute((scale * of_softmax + double(of_lse)) / double(sum));
    const compute factor = compute(scale), of_target = is_alone ? compute(0) : factor;
    for_each_pack<scalar_t>(row_phase, classes, lane, lanes, [&](auto at) {
      auto logits = load(x, at), weights = load(t, at);
#pragma unroll
      for (int j = 0; j < at.width; ++j) {
        const compute value = compute(logits.values[j]), weight = compute(weights.values[j]);
        logits.values[j] = of_exp * exp_of<scalar_t>(value - maximum) - of_target * weight;
        weights.values[j] = factor * (log_sum + (maximum - value));
      }
      if (grad_input) {
        store(grad_input + i * classes, at, logits);
      }
      if (grad_target) {
        store(grad_target + i * classes, at, weights);
      }
    });
  }
}

}  // namespace

std::tuple<Tensor, Tensor> cross_entropy_probabilities_cuda(const Tensor& input, const Tensor& target,
                                                            const std::string& reduction) {
  constexpr const char* op = "cross_entropy_probabilities";
  const Reduction reduce = check_reduction(op, reduction);
  check_cross_entropy_probabilities(op, input, target);
  const DeviceGuard guard(input.get_device_index());
  const int64_t rows = input.size(0), classes = input.size(1);
  const bool is_none = reduce == Reduction::None;
  const Tensor x = as_contiguous(input), t = as_contiguous(target);
  Tensor loss = empty(is_none ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, input.scalar_type(), input), lse;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    lse = empty({2, rows}, torch::headeronly::CppTypeToScalarType<compute>::value, input);
    const unsigned int blocks = sum_blocks_of(rows, classes);
    const Tensor partials = empty({blocks}, ScalarType::Double, input);
    const scalar_t *logits = x.const_data_ptr<scalar_t>(), *targets = t.const_data_ptr<scalar_t>();
    scalar_t* losses = loss.mutable_data_ptr<scalar_t>();
    const cudaStream_t stream = current_stream(input);
    dispatch_lanes(classes, [&](auto lanes) {
      probabilities_kernel<lanes.value, scalar_t><<<blocks, kThreads, 0, stream>>>(
          logits, targets, phase_of_both(phase_of(logits), phase_of(targets)), is_none ? losses : nullptr,
          partials.mutable_data_ptr<double>(), lse.mutable_data_ptr<compute>(), rows, classes);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    if (!is_none) {
      sum_kernel<scalar_t><<<1, kThreads, 0, stream>>>(partials.const_data_ptr<double>(), losses, blocks,
                                                       reduce == Reduction::Mean ? double(classes ? rows : 0) : 1.0);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {loss, lse};
}

std::tuple<Tensor, Tensor> cross_entropy_probabilities_backward_cuda(const Tensor& grad_output,
                                                                     const std::optional<Tensor>& grad_lse,
                                                                     const Tensor& input, const Tensor& target,
                                                                     const Tensor& lse, const std::string& reduction,
                                                                     bool needs_grad_input, bool needs_grad_target) {
  constexpr const char* op = "_cross_entropy_probabilities_backward";
  const Reduction reduce = check_reduction(op, reduction);
  check_cross_entropy_probabilities_backward(op, grad_output, grad_lse, input, target, lse, reduce);
  const DeviceGuard guard(input.get_device_index());
  const int64_t rows = input.size(0), classes = input.size(1);
  const std::vector<int64_t> none{0};
  Tensor grad_input = empty(needs_grad_input ? sizes_of(input) : none, input.scalar_type(), input);
  Tensor grad_target = empty(needs_grad_target ? sizes_of(input) : none, input.scalar_type(), input);
  if (input.numel() == 0) {
    return {grad_input, grad_target};
  }
  const Tensor x = as_contiguous(input), t = as_contiguous(target), statistics = as_contiguous(lse);
  const std::optional<Tensor> h = grad_lse ? std::optional(as_contiguous(*grad_lse)) : std::nullopt;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const scalar_t *logits = x.const_data_ptr<scalar_t>(), *targets = t.const_data_ptr<scalar_t>();
    scalar_t* of_input = needs_grad_input ? grad_input.mutable_data_ptr<scalar_t>() : nullptr;
    scalar_t* of_target = needs_grad_target ? grad_target.mutable_data_ptr<scalar_t>() : nullptr;
    int phase = phase_of_both(phase_of(logits), phase_of(targets));
    for (const scalar_t* result : {of_input, of_target}) {
      phase = result ? phase_of_both(phase, phase_of(result)) : phase;
    }
    dispatch_lanes(classes, [&](auto lanes) {
      probabilities_backward_kernel<lanes.value, scalar_t>
          <<<blocks_of(rows, kThreads / lanes.value), kThreads, 0, current_stream(input)>>>(
              grad_output.const_data_ptr<scalar_t>(), grad_output.dim() ? grad_output.stride(0) : 0,
              reduce == Reduction::Mean ? double(rows) : 1.0, h ? h->const_data_ptr<compute>() : nullptr, logits,
              targets, phase, statistics.const_data_ptr<compute>(), of_input, of_target, rows, classes);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {grad_input, grad_target};
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA, m) {
  m.impl("cross_entropy_probabilities", TORCH_BOX(&torch_mlp::cross_entropy_probabilities_cuda));
  m.impl("_cross_entropy_probabilities_backward", TORCH_BOX(&torch_mlp::cross_entropy_probabilities_backward_cuda));
}

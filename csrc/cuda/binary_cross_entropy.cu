// Binary cross-entropy of logits on CUDA.
//
//   forward     l_i  = w_i ((1 - y_i) softplus(x_i) + p_i y_i softplus(-x_i))      reduced by none, sum or mean
//   backward    gx_i = g_i w_i ((1 - y_i) sigmoid(x_i) - p_i y_i sigmoid(-x_i))
//               gy_i = g_i w_i (p_i softplus(-x_i) - softplus(x_i))
//
// Shapes: x and y (*), w (weight) and p (pos_weight) broadcast to it. How no digits are lost is in
// ../binary_cross_entropy.h. Fused: each direction is one sweep over x and y; weights are read as they repeat and not
// written out. Nothing goes back to the host: the backward pass reads the gradient of a reduced loss where it is.
// Threads: 16-byte accesses of x, a few for each thread. A block adds its losses, and one block adds these sums; the
// split depends on the shape alone, so that the bits are the same in every run.
#include "../binary_cross_entropy.h"

#include "common.cuh"

namespace torch_mlp {
namespace {

constexpr int64_t kMinPacksPerThread = 2;

// The blocks that a multiprocessor has to hold at once. Left to itself, the compiler would save so many registers for
// more of them that it spills.
constexpr int kMinBlocks = 4;

// A tensor that is broadcast to the shape of input, or none, which counts as 1.
template <typename scalar_t>
struct Repeated {
  const scalar_t* data;
  int64_t period;

  __device__ compute_t<scalar_t> operator[](int64_t i) const {
    // The division takes longer than all the rest, and a scalar and a whole tensor need none.
    return !data ? compute_t<scalar_t>(1) : compute_t<scalar_t>(data[period == 1 ? 0 : i < period ? i : i % period]);
  }
};

// What is read for every element; y's own phase may differ from x's.
template <typename scalar_t>
struct Elements {
  const scalar_t *x, *y;
  Repeated<scalar_t> weight, pos_weight;
  int64_t count;
};

// phase is that of x, and of all that is read and written beside it; negative where they differ.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    loss_kernel(Elements<scalar_t> of, int phase, scalar_t* __restrict__ loss, double* __restrict__ partials) {
  using compute = compute_t<scalar_t>;
  double sum = 0;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for_each_pack<scalar_t>(phase, of.count, thread, int64_t(gridDim.x) * kThreads, [&](auto at) {
    auto pack = load(of.x, at);
    const auto target = load(of.y, at);
#pragma unroll
    for (int j = 0; j < at.width; ++j) {
      const int64_t i = at.first() + j;
      const compute value =
          of.weight[i] * binary_cross_entropy(compute(pack.values[j]), compute(target.values[j]), of.pos_weight[i]);
      sum += double(value);
      pack.values[j] = static_cast<scalar_t>(value);
    }
    if (loss) {
      store(loss, at, pack);
    }
  });
  if (partials) {
    sum = block_reduce(sum, Add{});
    if (threadIdx.x == 0) {
      partials[blockIdx.x] = sum;
    }
  }
}

// grad_x and grad_y are null where they are not needed.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    gradient_kernel(Elements<scalar_t> of, Repeated<scalar_t> grad_output, double divisor, int phase,
                    scalar_t* __restrict__ grad_x, scalar_t* __restrict__ grad_y) {
  using compute = compute_t<scalar_t>;
  const bool is_scalar = grad_output.period == 1;  // else divisor is 1
  const compute scale = is_scalar ? static_cast<compute>(double(grad_output[0]) / divisor) : compute(1);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for_each_pack<scalar_t>(phase, of.count, thread, int64_t(gridDim.x) * kThreads, [&](auto at) {
    const auto input = load(of.x, at), target = load(of.y, at);
    Pack<scalar_t, at.width> by_x, by_y;
#pragma unroll
    for (int j = 0; j < at.width; ++j) {
      const int64_t i = at.first() + j;
      const compute x = compute(input.values[j]), y = compute(target.values[j]), p = of.pos_weight[i];
      const compute factor = (is_scalar ? scale : grad_output[i]) * of.weight[i];
      if (grad_x) {
        by_x.values[j] = static_cast<scalar_t>(factor * binary_cross_entropy_by_input(x, y, p));
      }
      if (grad_y) {
        by_y.values[j] = static_cast<scalar_t>(factor * binary_cross_entropy_by_target(x, p));
      }
    }
    if (grad_x) {
      store(grad_x, at, by_x);
    }
    if (grad_y) {
      store(grad_y, at, by_y);
    }
  });
}

// Contiguous tensors, kept while their memory is read, and what the kernels see of them.
template <typename scalar_t>
class Operands {
 public:
  Operands(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
           const std::optional<Tensor>& pos_weight)
      : x_(as_contiguous(input)), y_(as_contiguous(target)) {
    elements = {x_.const_data_ptr<scalar_t>(), y_.const_data_ptr<scalar_t>(), repeated(weight), repeated(pos_weight),
                x_.numel()};
  }

  Repeated<scalar_t> repeated(const std::optional<Tensor>& self) {
    if (!self) {
      return {nullptr, 0};
    }
    parts_.push_back(repeating_part(*self, x_));
    return {parts_.back().template const_data_ptr<scalar_t>(), parts_.back().numel()};
  }

  // That of x where all these have it too, else -1; null is anywhere.
  int common_phase(std::initializer_list<const scalar_t*> others) const {
    const int phase = phase_of(elements.x);
    const auto differs = [=](const scalar_t* other) { return other && phase_of(other) != phase; };
    return differs(elements.y) || std::any_of(others.begin(), others.end(), differs) ? -1 : phase;
  }

  unsigned int blocks(int64_t most = kMaxBlocks) const {
    return blocks_of(elements.count, kThreads * kMinPacksPerThread * kPackWidth<scalar_t>, most);
  }

  Elements<scalar_t> elements;

 private:
  Tensor x_, y_;
  std::vector<Tensor> parts_;
};

}  // namespace

Tensor binary_cross_entropy_cuda(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                 const std::optional<Tensor>& pos_weight, const std::string& reduction) {
  constexpr const char* op = "binary_cross_entropy_with_logits";
  const Reduction reduce = check_reduction(op, reduction);
  check_binary_cross_entropy(op, input, target, weight, pos_weight);
  const DeviceGuard guard(input.get_device_index());
  const bool is_none = reduce == Reduction::None;
  const Tensor loss = empty(is_none ? sizes_of(input) : std::vector<int64_t>{}, input.scalar_type(), input);
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const Operands<scalar_t> operands(input, target, weight, pos_weight);
    scalar_t* to = loss.mutable_data_ptr<scalar_t>();
    scalar_t* losses = is_none ? to : nullptr;
    const unsigned int blocks = operands.blocks(kMaxSumBlocks);
    const Tensor partials = empty({is_none ? 0 : blocks}, ScalarType::Double, input);
    double* sums = is_none ? nullptr : partials.mutable_data_ptr<double>();
    const cudaStream_t stream = current_stream(input);
    loss_kernel<scalar_t>
        <<<blocks, kThreads, 0, stream>>>(operands.elements, operands.common_phase({losses}), losses, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (!is_none) {
      const double divisor = reduce == Reduction::Mean ? double(input.numel()) : 1.0;
      sum_kernel<scalar_t><<<1, kThreads, 0, stream>>>(sums, to, blocks, divisor);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return loss;
}

std::tuple<Tensor, Tensor> binary_cross_entropy_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                              const Tensor& target, const std::optional<Tensor>& weight,
                                                              const std::optional<Tensor>& pos_weight,
                                                              const std::string& reduction, bool needs_grad_input,
                                                              bool needs_grad_target) {
  constexpr const char* op = "_binary_cross_entropy_with_logits_backward";
  const Reduction reduce = check_reduction(op, reduction);
  check_binary_cross_entropy_backward(op, grad_output, input, target, weight, pos_weight, reduce);
  const DeviceGuard guard(input.get_device_index());
  const ScalarType dtype = input.scalar_type();
  const Tensor grad_input = empty(needs_grad_input ? sizes_of(input) : std::vector<int64_t>{0}, dtype, input);
  const Tensor grad_target = empty(needs_grad_target ? sizes_of(input) : std::vector<int64_t>{0}, dtype, input);
  if (input.numel() == 0) {
    return {grad_input, grad_target};
  }
  dispatch_floating(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    Operands<scalar_t> operands(input, target, weight, pos_weight);
    scalar_t* to_input = needs_grad_input ? grad_input.mutable_data_ptr<scalar_t>() : nullptr;
    scalar_t* to_target = needs_grad_target ? grad_target.mutable_data_ptr<scalar_t>() : nullptr;
    gradient_kernel<scalar_t><<<operands.blocks(), kThreads, 0, current_stream(input)>>>(
        operands.elements, operands.repeated(grad_output), reduce == Reduction::Mean ? double(input.numel()) : 1.0,
        operands.common_phase({to_input, to_target}), to_input, to_target);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_input, grad_target};
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA, m) {
  m.impl("binary_cross_entropy_with_logits", TORCH_BOX(&torch_mlp::binary_cross_entropy_cuda));
  m.impl("_binary_cross_entropy_with_logits_backward", TORCH_BOX(&torch_mlp::binary_cross_entropy_backward_cuda));
}

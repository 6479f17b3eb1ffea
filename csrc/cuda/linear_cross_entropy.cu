// A linear layer and the softmax cross-entropy of its output, the logits, on CUDA.
//
//   z = x W^T + b, and loss, lse and gz, the gradient of z, as in cross_entropy.cu
//   backward    gx = gz W      gW = gz^T x      gb = sum over the batch of gz
//
// Shapes: x (batch, in_features), W (num_classes, in_features), b (num_classes,).
// Fused: z and gz are there for some rows at a time only. Where the loss is reduced, the forward pass computes the
// gradients with it, for a grad_output of 1, so that z need not be computed again; else, and where lse has a gradient,
// the backward pass computes z anew. The divisor of the mean is summed up before any z is there, on the device: nothing
// goes back to the host. The loss of 16-bit dtypes is in float. Memory beyond results, by the constants of launch.h:
// kChunkBytes or z of kMinChunkRows rows, whichever is more, and as much again for gz; for 16-bit dtypes gW in float,
// in which the chunks' are summed; and kSumThreads sums of gb in double, or one for each class, whichever is more.
// Threads: those of the softmax, see cross_entropy_rows.cuh; for gb, several share a column, each with a sum in double
// that stays in memory from chunk to chunk, and a warp adds the sums of a column. The products are the library's. How
// the work is split depends on the shape alone, so that the bits are the same in every run.
#include "../linear_cross_entropy.h"

#include "cross_entropy_rows.cuh"

namespace torch_mlp {
namespace {

// sums[k] += gz[k] + gz[k + stride] + gz[k + 2 stride] + ..., from 0 where is_first. stride is a multiple of the number
// of columns.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const scalar_t* __restrict__ gz, double* __restrict__ sums, int64_t count, int64_t stride,
                       bool is_first) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < stride; k += threads) {
    double sum = is_first ? 0.0 : sums[k];
#pragma unroll 8
    for (int64_t at = k; at < count; at += stride) {
      sum += double(compute_t<scalar_t>(gz[at]));
    }
    sums[k] = sum;
  }
}

// gb[c] = sum over i of sums[i, c], by a warp.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    grad_bias_kernel(const double* __restrict__ sums, scalar_t* __restrict__ gb, int64_t rows, int64_t classes) {
  constexpr int warps = kThreads / kWarpThreads;
  const int lane = threadIdx.x % kWarpThreads;
  for (int64_t c = int64_t(blockIdx.x) * warps + threadIdx.x / kWarpThreads; c < classes;
       c += int64_t(gridDim.x) * warps) {
    double sum = 0;
#pragma unroll 4
    for (int64_t i = lane; i < rows; i += kWarpThreads) {
      sum += sums[i * classes + c];
    }
    sum = warp_reduce<kWarpThreads>(sum, Add{});
    if (lane == 0) {
      gb[c] = static_cast<scalar_t>(sum);
    }
  }
}

// sums[k] += gw[k], from 0 where is_first; or, where is_last, gw[k] += sums[k]. Both are aligned.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) grad_weight_kernel(scalar_t* __restrict__ gw, float* __restrict__ sums,
                                                               int64_t count, bool is_first, bool is_last) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for_each_pack<scalar_t, 1>(0, count, thread, int64_t(gridDim.x) * kThreads, [&](auto at) {
    auto of_chunk = load(gw, at);
    auto sum = is_first ? Pack<float, at.width>{} : load(sums, at);
#pragma unroll
    for (int j = 0; j < at.width; ++j) {
      sum.values[j] += float(of_chunk.values[j]);
      of_chunk.values[j] = sum.values[j];
    }
    if (is_last) {
      store(gw, at, of_chunk);
    } else {
      store(sums, at, sum);
    }
  });
}

// The gradients, to which chunks of rows add.
template <typename scalar_t>
class Gradients {
 public:
  using compute = compute_t<scalar_t>;

  Gradients(const Arguments& of, Needs needs, int64_t chunk_rows)
      : input(empty(needs.input ? sizes_of(of.input) : kNone, of.input.scalar_type(), of.input)),
        weight(empty(needs.weight ? sizes_of(of.linear_weight) : kNone, of.input.scalar_type(), of.input)),
        bias(empty({needs.bias ? of.linear_weight.size(0) : 0}, of.input.scalar_type(), of.input)),
        of_(of),
        needs_(needs),
        column_threads_(column_threads_of(chunk_rows, of.linear_weight.size(0))),
        grad_logits_(empty({needs.any() ? chunk_rows : 0, of.linear_weight.size(0)}, of.input.scalar_type(), of.input)),
        weight_sums_(
            empty({kIs16Bit && chunk_rows < of.input.size(0) ? weight.numel() : 0}, ScalarType::Float, of.input)),
        bias_sums_(empty({column_threads_ * bias.numel()}, ScalarType::Double, of.input)) {}

  // Of the rows from begin to end, whose logits these are; incoming, maximum and sum are those of all rows.
  void add(const RowGradients<compute, compute>& incoming, const Tensor& logits, const compute* maximum,
           const compute* sum, const double* weight_sum, const Options& options, int64_t begin, int64_t end) {
    if (!needs_.any()) {
      return;
    }
    const bool is_first = begin == 0, is_last = end == of_.input.size(0);
    const Tensor grad_logits = rows_of(grad_logits_, 0, end - begin);
    cross_entropy_backward_rows(incoming.from(begin), logits.const_data_ptr<scalar_t>(),
                                of_.target.const_data_ptr<int64_t>() + begin, data_of<scalar_t>(of_.weight), weight_sum,
                                maximum + begin, sum + begin, grad_logits.mutable_data_ptr<scalar_t>(), end - begin,
                                logits.size(1), options, current_stream(logits));
    if (needs_.input) {
      matmul_out(rows_of(input, begin, end), grad_logits, of_.linear_weight);
    }
    if (needs_.weight) {
      add_weight(transpose(grad_logits), rows_of(of_.input, begin, end), is_first, is_last);
    }
    if (needs_.bias) {
      add_bias(grad_logits, is_first, is_last);
    }
  }

  Tensor input, weight, bias;

 private:
  static constexpr bool kIs16Bit = sizeof(scalar_t) == 2;
  static inline const std::vector<int64_t> kNone{0};

  void add_weight(const Tensor& grad_logits_t, const Tensor& x, bool is_first, bool is_last) {
    if (!kIs16Bit || (is_first && is_last)) {
      matmul_out(weight, grad_logits_t, x, is_first ? std::nullopt : std::optional(weight));
      return;
    }
    // In weight itself there is room for a chunk's gradient.
    matmul_out(weight, grad_logits_t, x);
    if constexpr (kIs16Bit) {
      const unsigned int blocks = blocks_of(weight.numel(), kThreads * kPackWidth<scalar_t>);
      grad_weight_kernel<<<blocks, kThreads, 0, current_stream(weight)>>>(weight.mutable_data_ptr<scalar_t>(),
                                                                          weight_sums_.mutable_data_ptr<float>(),
                                                                          weight.numel(), is_first, is_last);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

  void add_bias(const Tensor& grad_logits, bool is_first, bool is_last) {
    const cudaStream_t stream = current_stream(bias);
    const int64_t classes = bias.numel(), threads = bias_sums_.numel();
    double* sums = bias_sums_.mutable_data_ptr<double>();
    column_sums_kernel<<<blocks_of(threads, kThreads), kThreads, 0, stream>>>(
        grad_logits.const_data_ptr<scalar_t>(), sums, grad_logits.numel(), threads, is_first);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (is_last) {
      grad_bias_kernel<<<blocks_of(classes, kThreads / kWarpThreads), kThreads, 0, stream>>>(
          sums, bias.mutable_data_ptr<scalar_t>(), column_threads_, classes);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

  const Arguments& of_;
  const Needs needs_;
  const int64_t column_threads_;
  const Tensor grad_logits_, weight_sums_, bias_sums_;
};

// Calls body(logits, begin, end) for chunk after chunk of rows, and where there are none for that one chunk, so that
// sums over the rows come out as 0.
template <typename Body>
void for_each_chunk(const Arguments& of, int64_t chunk_rows, const Body& body) {
  const int64_t rows = of.input.size(0);
  const Tensor memory = empty({chunk_rows, of.linear_weight.size(0)}, of.input.scalar_type(), of.input);
  const Tensor linear_weight_t = transpose(of.linear_weight);
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + chunk_rows, rows);
    const Tensor logits = rows_of(memory, 0, end - begin);
    if (logits.numel() > 0) {
      matmul_out(logits, rows_of(of.input, begin, end), linear_weight_t, of.linear_bias);
    }
    body(logits, begin, end);
    begin = end;
  } while (begin < rows);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_cuda(
    const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias, const Tensor& target,
    const std::optional<Tensor>& weight, const std::string& reduction, int64_t ignore_index, double label_smoothing,
    bool needs_grad_input, bool needs_grad_weight, bool needs_grad_bias) {
  constexpr const char* op = "linear_cross_entropy";
  const Reduction reduce = check_reduction(op, reduction);
  check_linear_cross_entropy(op, input, linear_weight, linear_bias, target, weight, label_smoothing);
  const DeviceGuard guard(input.get_device_index());
  const Arguments of = contiguous_arguments(input, linear_weight, linear_bias, target, weight);
  const int64_t rows = input.size(0), classes = linear_weight.size(0);
  const bool is_none = reduce == Reduction::None;
  const Needs needs{!is_none && needs_grad_input, !is_none && needs_grad_weight, !is_none && needs_grad_bias};
  const Options options = options_of(ignore_index, label_smoothing, classes);
  const int64_t* labels = of.target.const_data_ptr<int64_t>();
  const cudaStream_t stream = current_stream(input);

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const ScalarType compute_dtype = torch::headeronly::CppTypeToScalarType<compute>::value;
    const Tensor loss = empty(is_none ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, compute_dtype, input);
    const Tensor lse = empty({2, rows}, compute_dtype, input);
    const Tensor total_weight = empty({}, compute_dtype, input);
    compute *maximum = lse.mutable_data_ptr<compute>(), *sum = maximum + rows;
    compute* losses = loss.mutable_data_ptr<compute>();

    const scalar_t* of_class = data_of<scalar_t>(of.weight);
    const std::optional<Tensor> weight_sum = sum_of_weights<scalar_t>(of.weight, label_smoothing);
    std::optional<Tensor> divisor;
    if (needs.any() && reduce == Reduction::Mean) {
      divisor = total_weight_of<scalar_t>(of.target, of.weight, classes, ignore_index);
    }
    const RowGradients<compute, compute> one{nullptr, 0, data_of<compute>(divisor), nullptr};
    const int64_t chunk_rows = chunk_rows_of(of.input.size(0), of.linear_weight.size(0), sizeof(scalar_t));
    Gradients<scalar_t> gradients(of, needs, chunk_rows);
    const unsigned int blocks = sum_blocks_of(chunk_rows, classes);
    const Tensor partials = empty({chunks_of(rows, chunk_rows), blocks, 2}, ScalarType::Double, input);
    double* of_chunk = partials.mutable_data_ptr<double>();
    for_each_chunk(of, chunk_rows, [&](const Tensor& logits, int64_t begin, int64_t end) {
      const scalar_t* z = logits.const_data_ptr<scalar_t>();
      cross_entropy_rows(z, labels + begin, of_class, data_of<double>(weight_sum), is_none ? losses + begin : nullptr,
                         maximum + begin, sum + begin, of_chunk, blocks, end - begin, classes, options, stream);
      of_chunk += 2 * blocks;
      gradients.add(one, logits, maximum, sum, data_of<double>(weight_sum), options, begin, end);
    });
    sum_losses(partials, is_none ? nullptr : losses, total_weight.mutable_data_ptr<compute>(),
               reduce == Reduction::Mean, stream);
    results = {loss, lse, total_weight, gradients.input, gradients.weight, gradients.bias};
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cuda(
    const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& input, const Tensor& linear_weight,
    const std::optional<Tensor>& linear_bias, const Tensor& target, const std::optional<Tensor>& weight,
    const Tensor& lse, const Tensor& total_weight, const std::string& reduction, int64_t ignore_index,
    double label_smoothing, bool needs_grad_input, bool needs_grad_weight, bool needs_grad_bias) {
  constexpr const char* op = "_linear_cross_entropy_backward";
  const Reduction reduce = check_reduction(op, reduction);
  check_linear_cross_entropy(op, input, linear_weight, linear_bias, target, weight, label_smoothing);
  check_computed(op, "total_weight", total_weight, {}, input);
  check_row_gradients(op, grad_output, grad_lse, input, lse, reduce, true);
  const DeviceGuard guard(input.get_device_index());
  const Arguments of = contiguous_arguments(input, linear_weight, linear_bias, target, weight);
  const Tensor statistics = as_contiguous(lse);
  const std::optional<Tensor> h = grad_lse ? std::optional(as_contiguous(*grad_lse)) : std::nullopt;
  const Options options = options_of(ignore_index, label_smoothing, linear_weight.size(0));
  std::tuple<Tensor, Tensor, Tensor> grads;
  dispatch_floating(input.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using compute = compute_t<scalar_t>;
    const compute *maximum = statistics.const_data_ptr<compute>(), *sum = maximum + input.size(0);
    const std::optional<Tensor> weight_sum = sum_of_weights<scalar_t>(of.weight, label_smoothing);
    const auto incoming = row_gradients<compute, compute>(grad_output, h, total_weight, reduce);
    const int64_t chunk_rows = chunk_rows_of(of.input.size(0), of.linear_weight.size(0), sizeof(scalar_t));
    Gradients<scalar_t> gradients(of, {needs_grad_input, needs_grad_weight, needs_grad_bias}, chunk_rows);
    for_each_chunk(of, chunk_rows, [&](const Tensor& logits, int64_t begin, int64_t end) {
      gradients.add(incoming, logits, maximum, sum, data_of<double>(weight_sum), options, begin, end);
    });
    grads = {gradients.input, gradients.weight, gradients.bias};
  });
  return grads;
}

}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&torch_mlp::linear_cross_entropy_cuda));
  m.impl("_linear_cross_entropy_backward", TORCH_BOX(&torch_mlp::linear_cross_entropy_backward_cuda));
}

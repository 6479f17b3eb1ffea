// The op that trains a network for many minibatches at once, on CUDA: small networks by train_epoch_persistent.cuh in
// one kernel, others by train_steps.h with the two kernels below.
//
//   gather   input[i, k] = scale * images[order[i], k] + shift, target[i] = labels[order[i]]
//   sgd      v = momentum v + (g + weight_decay w),  w = w - lr v
//
// Shapes: images (N, features), labels (N,), order (batch,) of this minibatch, input (batch, features), target
// (batch,); w, v, g of one parameter. Threads: one for each element of input, or of w, which stride over what is left.
#include "../train_steps.h"
#include "common.cuh"
#include "train_epoch_persistent.cuh"

namespace torch_mlp {
namespace {

// So many blocks keep the device busy; their threads stride.
constexpr int64_t kBusyBlocks = 4096;

template <typename pixel_t, typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const pixel_t* __restrict__ images, const int64_t* __restrict__ labels,
                  const int64_t* __restrict__ order, int64_t count, int64_t features, int64_t batch,
                  compute_t<scalar_t> scale, compute_t<scalar_t> shift, scalar_t* __restrict__ input,
                  int64_t* __restrict__ target) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  for (int64_t at = thread; at < batch * features; at += threads) {
    const int64_t i = at / features, image = order[i];
    CUDA_KERNEL_ASSERT(image >= 0 && image < count && "expected order in [0, N)");
    input[at] = scale * compute_t<scalar_t>(images[image * features + at % features]) + shift;
  }
  for (int64_t i = thread; i < batch; i += threads) {
    const int64_t image = order[i];
    CUDA_KERNEL_ASSERT(image >= 0 && image < count && "expected order in [0, N)");
    target[i] = labels[image];
  }
}

template <typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kThreads)
    sgd_kernel(scalar_t* __restrict__ value, scalar_t* __restrict__ velocity, const grad_t* __restrict__ gradient,
               grad_t* __restrict__ copy, int64_t count, scalar_t lr, scalar_t momentum, scalar_t weight_decay) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  for (int64_t at = thread; at < count; at += threads) {
    sgd_step(value[at], velocity ? velocity + at : nullptr, scalar_t(gradient[at]), lr, momentum, weight_decay);
    if (copy) {
      copy[at] = value[at];
    }
  }
}

unsigned int grid_for(int64_t threads) { return blocks_of(threads, kThreads, kBusyBlocks); }

struct Cuda {
  static constexpr auto linear_act = linear_act_cuda;
  static constexpr auto linear_act_backward = linear_act_backward_cuda;
  static constexpr auto cross_entropy = cross_entropy_cuda;
  static constexpr auto cross_entropy_backward = cross_entropy_backward_cuda;

  static void gather(const Gather& self) {
    dispatch_floating(self.input.scalar_type(), [&](auto zero) {
      using scalar_t = decltype(zero);
      const int64_t batch = self.input.size(0), features = self.input.size(1);
      const auto launch = [&](const auto* images) {
        gather_kernel<<<grid_for(batch * features), kThreads, 0, current_stream(self.images)>>>(
            images, self.labels.template const_data_ptr<int64_t>(),
            self.order.template const_data_ptr<int64_t>() + self.first, self.images.size(0), features, batch,
            compute_t<scalar_t>(self.scale), compute_t<scalar_t>(self.shift),
            self.input.template mutable_data_ptr<scalar_t>(), self.target.template mutable_data_ptr<int64_t>());
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      if (self.images.scalar_type() == ScalarType::Byte) {
        launch(self.images.template const_data_ptr<uint8_t>());
      } else {
        launch(self.images.template const_data_ptr<compute_t<scalar_t>>());
      }
    });
  }

  static void sgd(const ParameterStep& self) {
    const auto launch = [&](auto zero, auto grad_zero) {
      using scalar_t = decltype(zero);
      using grad_t = decltype(grad_zero);
      const int64_t count = self.value.numel();
      sgd_kernel<<<grid_for(count), kThreads, 0, current_stream(self.value)>>>(
          self.value.template mutable_data_ptr<scalar_t>(),
          self.velocity ? self.velocity->template mutable_data_ptr<scalar_t>() : nullptr,
          self.gradient.template const_data_ptr<grad_t>(),
          self.copy ? self.copy->template mutable_data_ptr<grad_t>() : nullptr, count, scalar_t(self.lr),
          scalar_t(self.momentum), scalar_t(self.weight_decay));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (self.value.scalar_type() == ScalarType::Double) {
      launch(double{}, double{});
    } else if (self.copy) {
      launch(float{}, torch::headeronly::BFloat16{});
    } else {
      launch(float{}, float{});
    }
  }
};

// --- all steps in one kernel ---

Act act_of(const std::string& activation) {
  Act result = Act::Identity;
  dispatch_differentiable("_train_epoch", activation, [&](auto act) {
    using Activation = decltype(act);
    result = std::is_same_v<Activation, Sigmoid> ? Act::Sigmoid
             : std::is_same_v<Activation, Tanh>  ? Act::Tanh
             : std::is_same_v<Activation, ReLU>  ? Act::ReLU
                                                 : Act::Identity;
  });
  return result;
}

// As many blocks as the device holds at once, one on each multiprocessor; 0 where they could not wait for each other.
int64_t persistent_blocks(int device) {
  int blocks = 0, can_wait = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&can_wait, cudaDevAttrCooperativeLaunch, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device));
  return can_wait ? blocks : 0;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// What train_steps does, in one launch.
Tensor train_persistent(const Tensor& images, const Tensor& labels, const Tensor& order,
                        const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                        const std::vector<Tensor>& velocities, const std::vector<std::string>& activations,
                        int64_t batch_size, const Tensor& lr, bool has_one_rate, double momentum, double weight_decay,
                        double scale, double shift, int64_t blocks) {
  Epoch epoch{};
  epoch.layer_count = int64_t(weights.size());
  epoch.image_count = images.size(0);
  epoch.features = images.size(1);
  epoch.samples = order.numel();
  epoch.batch_size = batch_size;
  epoch.most = std::min(batch_size, order.numel());
  int64_t outs = 0;
  for (const Tensor& weight : weights) {
    outs += weight.size(0);
  }
  const Tensor losses = empty({ceil_div(order.numel(), batch_size)}, ScalarType::Double, images);
  const Tensor row_losses = empty({epoch.most}, ScalarType::Double, images);
  const Tensor targets = empty({2 * epoch.most}, ScalarType::Long, images);
  const Tensor scratch = empty({2 * epoch.most * (epoch.features + outs) + 1}, ScalarType::Float, images);
  Tensor arrived = empty({1}, ScalarType::Long, images);
  torch::stable::fill_(arrived, 0.0);
  Tensor rates = empty({has_one_rate ? 0 : lr.numel()}, ScalarType::Double, images);
  if (!has_one_rate) {
    torch::stable::copy_(rates, lr, true);  // else the host would wait; memory that is not pinned is read at once
  }

  const auto pointer = [](const Tensor& self) {
    return self.numel() ? self.template mutable_data_ptr<float>() : nullptr;
  };
  float* free = pointer(scratch);
  const auto take = [&](int64_t count) { return std::exchange(free, free + count); };
  epoch.inputs = take(2 * epoch.most * epoch.features);
  for (size_t l = 0; l < weights.size(); ++l) {
    Layer& layer = epoch.layers[l];
    const bool moves = !velocities.empty();
    layer.weight = {pointer(weights[l]), moves ? pointer(velocities[2 * l]) : nullptr};
    layer.bias = {pointer(biases[l]), moves ? pointer(velocities[2 * l + 1]) : nullptr};
    layer.ins = weights[l].size(1);
    layer.outs = weights[l].size(0);
    layer.output = take(epoch.most * layer.outs);
    layer.grad = take(epoch.most * layer.outs);
    layer.act = act_of(activations[l]);
    layer.forward_tile = tile_of(epoch.most, layer.outs, layer.ins, blocks);
    layer.backward_tile = tile_of(epoch.most, layer.ins, layer.outs, blocks);
    layer.update_tile = tile_of(layer.outs, layer.ins + (layer.bias.value ? 1 : 0), epoch.most, blocks);
  }
  const Layer& last = epoch.layers[epoch.layer_count - 1];
  epoch.has_whole_rows = last.outs <= kTiles[last.forward_tile].cols;
  epoch.one = take(1);
  epoch.images = images.const_data_ptr();
  epoch.labels = labels.const_data_ptr<int64_t>();
  epoch.order = order.const_data_ptr<int64_t>();
  epoch.scale = float(scale);
  epoch.shift = float(shift);
  epoch.lr = float(*lr.const_data_ptr<double>());
  epoch.momentum = float(momentum);
  epoch.weight_decay = float(weight_decay);
  epoch.rates = has_one_rate ? nullptr : rates.const_data_ptr<double>();
  epoch.targets = targets.mutable_data_ptr<int64_t>();
  epoch.row_losses = row_losses.mutable_data_ptr<double>();
  epoch.losses = losses.mutable_data_ptr<double>();
  epoch.arrived = reinterpret_cast<unsigned long long*>(arrived.mutable_data_ptr<int64_t>());

  const auto launch = [&](auto pixel) {
    using pixel_t = decltype(pixel);
    constexpr int64_t width = kPackWidth<float>;
    const auto address = reinterpret_cast<uintptr_t>(epoch.images);
    epoch.is_packed = epoch.features % width == 0 && address % (width * sizeof(pixel_t)) == 0;
    void* arguments[] = {&epoch};
    STD_CUDA_CHECK(cudaLaunchCooperativeKernel(train_kernel<pixel_t>, dim3(static_cast<unsigned int>(blocks)),
                                               dim3(kThreads), arguments, 0, current_stream(images)));
  };
  if (images.scalar_type() == ScalarType::Byte) {
    launch(uint8_t{});
  } else {
    launch(float{});
  }
  return losses;
}

Tensor train_epoch_cuda(const Tensor& images, const Tensor& labels, const Tensor& order,
                        const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                        const std::vector<Tensor>& velocities, const std::vector<std::string>& activations,
                        int64_t batch_size, const Tensor& lr, double momentum, double weight_decay, double scale,
                        double shift, bool bfloat16) {
  check_train_epoch("_train_epoch", images, labels, order, weights, biases, velocities, activations.size(), batch_size,
                    lr, momentum, bfloat16);
  const DeviceGuard guard(images.get_device_index());
  const double* rates = lr.const_data_ptr<double>();
  const bool has_one_rate = std::all_of(rates, rates + lr.numel(), [&](double rate) { return rate == rates[0]; });
  int64_t parameters = 0;
  for (const Tensor& weight : weights) {
    parameters += weight.numel();
  }
  // A graph that is being captured could not copy the rates from the memory of the CPU.
  if (weights[0].scalar_type() == ScalarType::Float &&
      fits_persistent(int64_t(weights.size()), weights.back().size(0), std::min(batch_size, order.numel()), parameters,
                      bfloat16) &&
      (has_one_rate || !is_capturing(current_stream(images)))) {
    if (const int64_t blocks = persistent_blocks(images.get_device_index())) {
      return train_persistent(images, labels, order, weights, biases, velocities, activations, batch_size, lr,
                              has_one_rate, momentum, weight_decay, scale, shift, blocks);
    }
  }
  return train_steps<Cuda>(images, labels, order, weights, biases, velocities, activations, batch_size, rates, momentum,
                           weight_decay, scale, shift, bfloat16 ? ScalarType::BFloat16 : weights[0].scalar_type());
}

}  // namespace
}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA, m) { m.impl("_train_epoch", TORCH_BOX(&torch_mlp::train_epoch_cuda)); }

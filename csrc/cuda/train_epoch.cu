// The op that trains a network for many minibatches at once, on CUDA: train_steps.h with the two kernels below.
//
//   gather   input[i, k] = scale * images[order[i], k] + shift, target[i] = labels[order[i]]
//   sgd      v = momentum v + (g + weight_decay w),  w = w - lr v
//
// Shapes: images (N, features), labels (N,), order (batch,) of this minibatch, input (batch, features), target
// (batch,); w, v, g of one parameter. Threads: one for each element of input, or of w, which stride over what is left.
#include "../train_steps.h"
#include "common.cuh"

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

Tensor train_epoch_cuda(const Tensor& images, const Tensor& labels, const Tensor& order,
                        const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                        const std::vector<Tensor>& velocities, const std::vector<std::string>& activations,
                        int64_t batch_size, const Tensor& lr, double momentum, double weight_decay, double scale,
                        double shift, bool bfloat16) {
  check_train_epoch("_train_epoch", images, labels, order, weights, biases, velocities, activations.size(), batch_size,
                    lr, momentum, bfloat16);
  const DeviceGuard guard(images.get_device_index());
  return train_steps<Cuda>(images, labels, order, weights, biases, velocities, activations, batch_size,
                           lr.const_data_ptr<double>(), momentum, weight_decay, scale, shift,
                           bfloat16 ? ScalarType::BFloat16 : weights[0].scalar_type());
}

}  // namespace
}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA, m) { m.impl("_train_epoch", TORCH_BOX(&torch_mlp::train_epoch_cuda)); }

// Minibatch SGD of a multilayer perceptron on any device, step by step through the other ops: gather, each layer
// forward, softmax cross-entropy, each layer backward, a step of SGD. What it computes is in cpu/trainer.h, which is
// faster for float32 on the CPU.
//
// All of it is queued on the current stream and nothing is read back, so that a CUDA graph can capture it.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "activation.h"
#include "cross_entropy.h"
#include "linear_act.h"

namespace torch_mlp {

// The images and labels of a minibatch: input (batch, features) = scale * images[order[first + i]] + shift, and target.
struct Gather {
  const Tensor &images, &labels, &order;
  int64_t first;
  double scale, shift;
  const Tensor &input, &target;
};

// A step of SGD: velocity = momentum * velocity + (gradient + weight_decay * value), and value moves by -lr times that;
// without velocity by -lr times the parenthesis.
struct ParameterStep {
  const Tensor& value;
  const Tensor* velocity;  // or null
  const Tensor& gradient;
  double lr, momentum, weight_decay;
  const Tensor* copy;  // becomes value, in another dtype; or null
};

// Some elements of a contiguous vector.
inline Tensor elements_of(const Tensor& self, int64_t begin, int64_t count) {
  const int64_t stride = 1;
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(self.get(), 1, &count, &stride, begin, &view));
  return Tensor(view);
}

// The mean loss of each minibatch. Device has static functions gather, sgd, and the ops that steps are made of; biases
// may be empty tensors, velocities are there where momentum is not 0; the products are of dtype compute.
template <typename Device>
Tensor train_steps(const Tensor& images, const Tensor& labels, const Tensor& order, const std::vector<Tensor>& weights,
                   const std::vector<Tensor>& biases, const std::vector<Tensor>& velocities,
                   const std::vector<std::string>& activations, int64_t batch_size, const double* lr, double momentum,
                   double weight_decay, double scale, double shift, ScalarType compute) {
  for (const std::string& activation : activations) {
    dispatch_differentiable("_train_epoch", activation, [](auto) {});  // before anything moves
  }
  constexpr int64_t no_ignore_index = std::numeric_limits<int64_t>::min();
  const int64_t layers = int64_t(weights.size()), count = order.numel(), most = std::min(batch_size, count);
  const Tensor inputs = empty({most, images.size(1)}, compute, images),
               targets = empty({most}, ScalarType::Long, images);
  const Tensor losses = empty({ceil_div(count, batch_size)}, ScalarType::Double, images);
  Tensor one = empty({}, compute, images);
  torch::stable::fill_(one, 1.0);

  // Weight and bias of each layer as the products take them: themselves, or copies in the other dtype.
  std::vector<Tensor> parameters, copies;
  for (int64_t l = 0; l < layers; ++l) {
    parameters.insert(parameters.end(), {weights[l], biases[l]});
  }
  for (Tensor& parameter : parameters) {
    copies.push_back(parameter);
    if (parameter.scalar_type() != compute) {
      copies.back() = empty(sizes_of(parameter), compute, images);
      torch::stable::copy_(copies.back(), parameter);
    }
  }
  const auto bias_of = [&](int64_t l) { return biases[l].numel() ? std::optional(copies[2 * l + 1]) : std::nullopt; };

  for (int64_t first = 0, i = 0; first < count; first += batch_size, ++i) {
    const int64_t size = std::min(batch_size, count - first);
    const Tensor input = rows_of(inputs, 0, size), target = elements_of(targets, 0, size);
    Device::gather({images, labels, order, first, scale, shift, input, target});
    std::vector<Tensor> outputs;
    for (int64_t l = 0; l < layers; ++l) {
      outputs.push_back(Device::linear_act(l ? outputs.back() : input, copies[2 * l], bias_of(l), activations[l]));
    }
    const Tensor& logits = outputs.back();
    const auto [loss, lse, total_weight] =
        Device::cross_entropy(logits, target, std::nullopt, "mean", no_ignore_index, 0.0);
    Tensor to = elements_of(losses, i, 1);
    torch::stable::copy_(to, loss);
    Tensor grad = Device::cross_entropy_backward(one, std::nullopt, logits, target, std::nullopt, lse, total_weight,
                                                 "mean", no_ignore_index, 0.0);
    for (int64_t l = layers - 1; l >= 0; --l) {
      std::array<Tensor, 2> grads;
      std::tie(grad, grads[0], grads[1]) =
          Device::linear_act_backward(grad, l ? outputs[l - 1] : input, copies[2 * l], outputs[l], activations[l],
                                      l > 0, true, biases[l].numel() > 0);
      for (int64_t p = 2 * l; p < 2 * l + 2; ++p) {
        if (parameters[p].numel()) {
          Device::sgd({parameters[p], momentum == 0 ? nullptr : &velocities[p], grads[p % 2], lr[i], momentum,
                       weight_decay, parameters[p].scalar_type() == compute ? nullptr : &copies[p]});
        }
      }
    }
  }
  return losses;
}

}  // namespace torch_mlp

// The op that trains a network for many minibatches at once: trainer.h does it for float32, train_steps.h for float64.
#include "../tensor.h"
#include "../train_steps.h"
#include "dtypes.h"
#include "trainer.h"

namespace torch_mlp {
namespace {

ActivationKind activation_kind(const char* op, const std::string& name) {
  ActivationKind kind = ActivationKind::Identity;
  dispatch_differentiable(op, name, [&](auto act) { kind = kind_of<decltype(act)>; });
  return kind;
}

// Whether skipping the pixels that are 0 pays, by some of the images.
bool has_few_pixels(const Images& images, int64_t features) {
  constexpr int64_t most_sampled = 300;
  constexpr double most_nonzero = 0.6;
  const int64_t distance = std::max<int64_t>(1, ceil_div(images.count, most_sampled));
  int64_t sampled = 0, nonzero = 0;
  for (int64_t i = 0; i < images.count; i += distance, ++sampled) {
    const uint8_t* image = images.bytes + images.order[i] * features;
    nonzero += std::count_if(image, image + features, [](uint8_t pixel) { return pixel != 0; });
  }
  return double(nonzero) <= most_nonzero * double(sampled * features);
}

// Whether products of bfloat16 are faster than those of floats: by a matrix unit, and by pairs on AMD's processors. By
// pairs on Intel Emerald Rapids an epoch took 1.5 times as long, and where a processor has no products of pairs more.
bool bfloat16_wins() {
  return has_unit() || (kernels().into_bfloat16.linear && faster_products() == Products::Kernels);
}

struct Cpu {
  static constexpr auto linear_act = linear_act_cpu;
  static constexpr auto linear_act_backward = linear_act_backward_cpu;
  static constexpr auto cross_entropy = cross_entropy_cpu;
  static constexpr auto cross_entropy_backward = cross_entropy_backward_cpu;

  static void gather(const Gather& self) {
    const int64_t features = self.input.size(1);
    const auto normalize = [&](const auto* images) {
      for (int64_t i = 0; i < self.input.size(0); ++i) {
        const int64_t image = self.order.const_data_ptr<int64_t>()[self.first + i];
        self.target.mutable_data_ptr<int64_t>()[i] = self.labels.const_data_ptr<int64_t>()[image];
        std::transform(images + image * features, images + (image + 1) * features,
                       self.input.mutable_data_ptr<double>() + i * features,
                       [&](auto pixel) { return self.scale * double(pixel) + self.shift; });
      }
    };
    self.images.scalar_type() == ScalarType::Byte ? normalize(self.images.const_data_ptr<uint8_t>())
                                                  : normalize(self.images.const_data_ptr<double>());
  }

  static void sgd(const ParameterStep& self) {
    double *value = self.value.mutable_data_ptr<double>(),
           *velocity = self.velocity ? self.velocity->mutable_data_ptr<double>() : nullptr;
    const double* gradient = self.gradient.const_data_ptr<double>();
    for (int64_t i = 0; i < self.value.numel(); ++i) {
      sgd_step(value[i], velocity ? velocity + i : nullptr, gradient[i], self.lr, self.momentum, self.weight_decay);
    }
  }
};

Tensor train_epoch_cpu(const Tensor& images, const Tensor& labels, const Tensor& order,
                       const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                       const std::vector<Tensor>& velocities, const std::vector<std::string>& activations,
                       int64_t batch_size, const Tensor& lr, double momentum, double weight_decay, double scale,
                       double shift, bool bfloat16) {
  constexpr const char* op = "_train_epoch";
  check_train_epoch(op, images, labels, order, weights, biases, velocities, activations.size(), batch_size, lr,
                    momentum, bfloat16);
  const int64_t classes = weights.back().size(0), count = order.numel();
  const int64_t* order_data = order.const_data_ptr<int64_t>();
  const int64_t* label_data = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t image = order_data[i];
    check<std::out_of_range>(uint64_t(image) < uint64_t(images.size(0)), op, ": expected order in [0, ", images.size(0),
                             "), got ", image, " at position ", i);
    check<std::out_of_range>(uint64_t(label_data[image]) < uint64_t(classes), op, ": expected labels in [0, ", classes,
                             "), got ", label_data[image], " at position ", image);
  }
  if (weights[0].scalar_type() == ScalarType::Double) {
    return train_steps<Cpu>(images, labels, order, weights, biases, velocities, activations, batch_size,
                            lr.const_data_ptr<double>(), momentum, weight_decay, scale, shift, ScalarType::Double);
  }
  std::vector<Layer> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    const auto parameter = [&](const Tensor& value, size_t velocity) {
      return Parameter{value.numel() ? value.mutable_data_ptr<float>() : nullptr,
                       momentum == 0 || !value.numel() ? nullptr : velocities[velocity].mutable_data_ptr<float>()};
    };
    layers.push_back({weights[l].size(1), weights[l].size(0), activation_kind(op, activations[l]),
                      parameter(weights[l], 2 * l), parameter(biases[l], 2 * l + 1)});
  }
  const bool are_bytes = images.scalar_type() == ScalarType::Byte;
  const Images data{are_bytes ? images.const_data_ptr<uint8_t>() : nullptr,
                    are_bytes ? nullptr : images.const_data_ptr<float>(),
                    label_data,
                    order_data,
                    count,
                    scale,
                    shift};
  const bool skips_zeros = are_bytes && has_few_pixels(data, images.size(1));
  const Options options{batch_size,  lr.const_data_ptr<double>(), momentum, weight_decay,
                        skips_zeros, bfloat16 && bfloat16_wins()};
  const Tensor losses = empty({ceil_div(count, batch_size)}, ScalarType::Double, lr);
  Trainer(layers, data, options, std::max<int64_t>(1, torch::stable::get_num_threads()))
      .run(losses.mutable_data_ptr<double>());
  return losses;
}

}  // namespace
}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CPU, m) { m.impl("_train_epoch", TORCH_BOX(&torch_mlp::train_epoch_cpu)); }

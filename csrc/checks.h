// Argument checks, called by the CPU and the CUDA kernels before any memory is touched, so that both say the same
// sentence: op, expected, got.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace torch_mlp {

// Throws Error with the parts as its message. STD_TORCH_CHECK would put this file's path on the builder's machine into
// the sentence, and knows no exception but RuntimeError. Of other exceptions every torch translates std::out_of_range,
// into IndexError; a ValueError has to come from Python, for torch 2.15 makes RuntimeErrors of the rest.
template <typename Error = std::runtime_error, typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) {
    std::ostringstream message;
    (message << ... << parts);
    throw Error(message.str());
  }
}

// What a message says of a tensor; written out only if the check fails, for the checks run at every call.
struct Shape {
  const int64_t* sizes;
  size_t dim;

  friend std::ostream& operator<<(std::ostream& out, const Shape& self) {
    out << '(';
    for (size_t d = 0; d < self.dim; ++d) {
      out << (d ? ", " : "") << self.sizes[d];
    }
    return out << (self.dim == 1 ? ",)" : ")");
  }
};

template <typename Sizes>
Shape shape_of(const Sizes& sizes) {
  return {sizes.data(), sizes.size()};
}

struct Device {
  const torch::stable::Tensor& self;

  friend std::ostream& operator<<(std::ostream& out, const Device& device) {
    return device.self.is_cpu() ? out << "cpu" : out << "cuda:" << device.self.get_device_index();
  }
};

inline void check_floating(const char* op, const char* name, const torch::stable::Tensor& self) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = self.scalar_type();
  check(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
            dtype == ScalarType::Half,
        op, ": expected ", name, " of dtype Double, Float, BFloat16 or Half, got ", torch::headeronly::toString(dtype));
}

inline void check_same_device(const char* op, const char* name, const torch::stable::Tensor& self,
                              const torch::stable::Tensor& input) {
  check(self.is_cpu() == input.is_cpu() && self.get_device_index() == input.get_device_index(), op, ": expected ", name,
        " on the device of input, ", Device{input}, ", got ", Device{self});
}

inline void check_like_input(const char* op, const char* name, const torch::stable::Tensor& self,
                             const torch::stable::Tensor& input) {
  check_same_device(op, name, self, input);
  check(self.scalar_type() == input.scalar_type(), op, ": expected ", name, " of the dtype of input, ",
        torch::headeronly::toString(input.scalar_type()), ", got ", torch::headeronly::toString(self.scalar_type()));
}

template <typename Sizes>
void check_shape(const char* op, const char* name, const torch::stable::Tensor& self, const Sizes& expected) {
  const auto sizes = self.sizes();
  check(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), op, ": expected ", name, " of shape ",
        shape_of(expected), ", got ", shape_of(self.sizes()));
}

// --- linear_act: input (*, in_features), weight (out_features, in_features), bias (out_features,) ---

inline void check_linear_act(const char* op, const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                             const std::optional<torch::stable::Tensor>& bias) {
  check_floating(op, "input", input);
  check_like_input(op, "weight", weight, input);
  check(input.dim() >= 1, op, ": expected input of shape (*, in_features), got a scalar");
  check(weight.dim() == 2 && weight.size(1) == input.size(input.dim() - 1), op,
        ": expected weight of shape (out_features, ", input.size(input.dim() - 1), "), got ", shape_of(weight.sizes()));
  if (bias) {
    check_like_input(op, "bias", *bias, input);
    check_shape(op, "bias", *bias, std::vector<int64_t>{weight.size(0)});
  }
}

inline void check_linear_act_backward(const char* op, const torch::stable::Tensor& grad_output,
                                      const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                      const torch::stable::Tensor& output) {
  check_linear_act(op, input, weight, std::nullopt);
  std::vector<int64_t> output_sizes(input.sizes().begin(), input.sizes().end());
  output_sizes.back() = weight.size(0);
  check_like_input(op, "output", output, input);
  check_shape(op, "output", output, output_sizes);
  check_like_input(op, "grad_output", grad_output, input);
  check_shape(op, "grad_output", grad_output, output_sizes);
}

// --- cross_entropy: input (batch, num_classes), target (batch,), weight (num_classes,) ---

enum class Reduction { None, Mean, Sum };

inline Reduction check_reduction(const char* op, const std::string& name) {
  check(name == "none" || name == "mean" || name == "sum", op,
        ": expected reduction to be one of none, mean, sum, got '", name, "'");
  return name == "none" ? Reduction::None : name == "mean" ? Reduction::Mean : Reduction::Sum;
}

// A class for each row of input, and how it is smoothed.
inline void check_classes(const char* op, const torch::stable::Tensor& target, const torch::stable::Tensor& input,
                          double label_smoothing) {
  check(target.scalar_type() == torch::headeronly::ScalarType::Long, op, ": expected target of dtype Long, got ",
        torch::headeronly::toString(target.scalar_type()));
  check_same_device(op, "target", target, input);
  check_shape(op, "target", target, std::vector<int64_t>{input.size(0)});
  check(label_smoothing >= 0.0 && label_smoothing <= 1.0, op, ": expected label_smoothing in [0, 1], got ",
        label_smoothing);
}

inline void check_cross_entropy(const char* op, const torch::stable::Tensor& input, const torch::stable::Tensor& target,
                                const std::optional<torch::stable::Tensor>& weight, double label_smoothing) {
  check_floating(op, "input", input);
  check(input.dim() == 2, op, ": expected input of shape (batch, num_classes), got ", shape_of(input.sizes()));
  if (weight) {
    check_like_input(op, "weight", *weight, input);
    check_shape(op, "weight", *weight, std::vector<int64_t>{input.size(1)});
  }
  check_classes(op, target, input, label_smoothing);
}

// Of the dtype in which values like those of input are computed.
inline void check_computed(const char* op, const char* name, const torch::stable::Tensor& self,
                           const std::vector<int64_t>& sizes, const torch::stable::Tensor& input) {
  using torch::headeronly::ScalarType;
  const ScalarType compute = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_same_device(op, name, self, input);
  check(self.scalar_type() == compute, op, ": expected ", name, " of dtype ", torch::headeronly::toString(compute),
        ", got ", torch::headeronly::toString(self.scalar_type()));
  check_shape(op, name, self, sizes);
}

// What comes in for the loss and the lse of the rows of input, and that lse; is_computed: the loss is not of the dtype
// of input but of that of lse.
inline void check_row_gradients(const char* op, const torch::stable::Tensor& grad_output,
                                const std::optional<torch::stable::Tensor>& grad_lse,
                                const torch::stable::Tensor& input, const torch::stable::Tensor& lse,
                                Reduction reduction, bool is_computed = false) {
  const int64_t rows = input.size(0);
  check_computed(op, "lse", lse, std::vector<int64_t>{2, rows}, input);
  if (grad_lse) {
    check_computed(op, "grad_lse", *grad_lse, std::vector<int64_t>{rows}, input);
  }
  const auto sizes = reduction == Reduction::None ? std::vector<int64_t>{rows} : std::vector<int64_t>{};
  if (is_computed) {
    check_computed(op, "grad_output", grad_output, sizes, input);
  } else {
    check_like_input(op, "grad_output", grad_output, input);
    check_shape(op, "grad_output", grad_output, sizes);
  }
}

inline void check_cross_entropy_backward(const char* op, const torch::stable::Tensor& grad_output,
                                         const std::optional<torch::stable::Tensor>& grad_lse,
                                         const torch::stable::Tensor& input, const torch::stable::Tensor& target,
                                         const std::optional<torch::stable::Tensor>& weight,
                                         const torch::stable::Tensor& lse, const torch::stable::Tensor& total_weight,
                                         Reduction reduction, double label_smoothing) {
  check_cross_entropy(op, input, target, weight, label_smoothing);
  check_computed(op, "total_weight", total_weight, std::vector<int64_t>{}, input);
  check_row_gradients(op, grad_output, grad_lse, input, lse, reduction);
}

// --- cross_entropy_probabilities: input and target (batch, num_classes) ---

inline void check_cross_entropy_probabilities(const char* op, const torch::stable::Tensor& input,
                                              const torch::stable::Tensor& target) {
  check_floating(op, "input", input);
  check(input.dim() == 2, op, ": expected input of shape (batch, num_classes), got ", shape_of(input.sizes()));
  check_like_input(op, "target", target, input);
  check_shape(op, "target", target, input.sizes());
}

inline void check_cross_entropy_probabilities_backward(const char* op, const torch::stable::Tensor& grad_output,
                                                       const std::optional<torch::stable::Tensor>& grad_lse,
                                                       const torch::stable::Tensor& input,
                                                       const torch::stable::Tensor& target,
                                                       const torch::stable::Tensor& lse, Reduction reduction) {
  check_cross_entropy_probabilities(op, input, target);
  check_row_gradients(op, grad_output, grad_lse, input, lse, reduction);
}

// --- linear_cross_entropy: input (batch, in_features), linear_weight (num_classes, in_features), linear_bias
// (num_classes,), target (batch,), weight (num_classes,) ---

inline void check_linear_cross_entropy(const char* op, const torch::stable::Tensor& input,
                                       const torch::stable::Tensor& linear_weight,
                                       const std::optional<torch::stable::Tensor>& linear_bias,
                                       const torch::stable::Tensor& target,
                                       const std::optional<torch::stable::Tensor>& weight, double label_smoothing) {
  check_floating(op, "input", input);
  check_like_input(op, "linear_weight", linear_weight, input);
  check(input.dim() == 2, op, ": expected input of shape (batch, in_features), got ", shape_of(input.sizes()));
  check(linear_weight.dim() == 2 && linear_weight.size(1) == input.size(1), op,
        ": expected linear_weight of shape (num_classes, ", input.size(1), "), got ", shape_of(linear_weight.sizes()));
  const std::vector<int64_t> of_classes{linear_weight.size(0)};
  if (linear_bias) {
    check_like_input(op, "linear_bias", *linear_bias, input);
    check_shape(op, "linear_bias", *linear_bias, of_classes);
  }
  if (weight) {
    check_like_input(op, "weight", *weight, input);
    check_shape(op, "weight", *weight, of_classes);
  }
  check_classes(op, target, input, label_smoothing);
}

// --- binary_cross_entropy_with_logits: input (*), target (*), weight and pos_weight that broadcast to (*) ---

inline void check_broadcasts(const char* op, const char* name, const torch::stable::Tensor& self,
                             const torch::stable::Tensor& input) {
  bool broadcasts = self.dim() <= input.dim();
  for (int64_t d = 1; broadcasts && d <= self.dim(); ++d) {
    const int64_t size = self.size(self.dim() - d);
    broadcasts = size == 1 || size == input.size(input.dim() - d);
  }
  check(broadcasts, op, ": expected ", name, " that broadcasts to the shape of input, ", shape_of(input.sizes()),
        ", got ", shape_of(self.sizes()));
}

inline void check_binary_cross_entropy(const char* op, const torch::stable::Tensor& input,
                                       const torch::stable::Tensor& target,
                                       const std::optional<torch::stable::Tensor>& weight,
                                       const std::optional<torch::stable::Tensor>& pos_weight) {
  check_floating(op, "input", input);
  check_like_input(op, "target", target, input);
  check_shape(op, "target", target, input.sizes());
  for (const auto& [name, self] : {std::pair{"weight", &weight}, std::pair{"pos_weight", &pos_weight}}) {
    if (*self) {
      check_like_input(op, name, **self, input);
      check_broadcasts(op, name, **self, input);
    }
  }
}

inline void check_binary_cross_entropy_backward(const char* op, const torch::stable::Tensor& grad_output,
                                                const torch::stable::Tensor& input, const torch::stable::Tensor& target,
                                                const std::optional<torch::stable::Tensor>& weight,
                                                const std::optional<torch::stable::Tensor>& pos_weight,
                                                Reduction reduction) {
  check_binary_cross_entropy(op, input, target, weight, pos_weight);
  check_like_input(op, "grad_output", grad_output, input);
  check_shape(op, "grad_output", grad_output,
              reduction == Reduction::None ? std::vector<int64_t>(input.sizes().begin(), input.sizes().end())
                                           : std::vector<int64_t>{});
}

// --- train_epoch: images (N, features), labels (N,), order (samples,), lr (minibatches,) on the CPU, and for each
// layer a weight, a bias (empty where there is none) and, where there is momentum, the velocities of both ---

inline void check_train_epoch(const char* op, const torch::stable::Tensor& images, const torch::stable::Tensor& labels,
                              const torch::stable::Tensor& order, const std::vector<torch::stable::Tensor>& weights,
                              const std::vector<torch::stable::Tensor>& biases,
                              const std::vector<torch::stable::Tensor>& velocities, size_t activations,
                              int64_t batch_size, const torch::stable::Tensor& lr, double momentum, bool bfloat16) {
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  using Sizes = std::vector<int64_t>;
  const auto check_contiguous = [&](const char* name, const Tensor& self, ScalarType dtype, const Sizes& sizes) {
    check(self.is_contiguous() && self.scalar_type() == dtype, op, ": expected ", name,
          " to be contiguous and of dtype ", torch::headeronly::toString(dtype), ", got ",
          torch::headeronly::toString(self.scalar_type()));
    check_shape(op, name, self, sizes);
  };
  const auto check_tensor = [&](const char* name, const Tensor& self, ScalarType dtype, const Sizes& sizes) {
    check_same_device(op, name, self, images);
    check_contiguous(name, self, dtype, sizes);
  };
  check(images.dim() == 2, op, ": expected images of shape (N, features), got ", shape_of(images.sizes()));
  check_tensor("labels", labels, ScalarType::Long, Sizes{images.size(0)});
  check_tensor("order", order, ScalarType::Long, Sizes{order.numel()});
  check(batch_size >= 1, op, ": expected batch_size of at least 1, got ", batch_size);
  check(lr.is_cpu(), op, ": expected lr on the CPU, got it elsewhere");
  check_contiguous("lr", lr, ScalarType::Double, Sizes{(order.numel() + batch_size - 1) / batch_size});
  check(!weights.empty() && biases.size() == weights.size() && activations == weights.size() &&
            velocities.size() == (momentum == 0 ? 0 : 2 * weights.size()),
        op, ": expected a weight, a bias, an activation and, with momentum, two velocities for each layer, got ",
        weights.size(), ", ", biases.size(), ", ", activations, " and ", velocities.size());
  const ScalarType dtype = weights[0].scalar_type();
  check(dtype == ScalarType::Float || (dtype == ScalarType::Double && !bfloat16), op,
        ": expected weights of dtype Float, or Double but for products of bfloat16, got ",
        torch::headeronly::toString(dtype));
  check_tensor("images", images, images.scalar_type() == ScalarType::Byte ? ScalarType::Byte : dtype,
               Sizes{images.size(0), images.size(1)});
  int64_t ins = images.size(1);
  for (size_t l = 0; l < weights.size(); ++l) {
    check(weights[l].dim() == 2 && weights[l].size(0) > 0 && weights[l].size(1) > 0, op,
          ": expected weights of shape (out_features, in_features), got ", shape_of(weights[l].sizes()));
    const int64_t outs = weights[l].size(0);
    const Sizes bias_sizes{biases[l].numel() ? outs : 0};
    check_tensor("weight", weights[l], dtype, Sizes{outs, ins});
    check_tensor("bias", biases[l], dtype, bias_sizes);
    if (momentum != 0) {
      check_tensor("velocity", velocities[2 * l], dtype, Sizes{outs, ins});
      check_tensor("velocity", velocities[2 * l + 1], dtype, bias_sizes);
    }
    ins = outs;
  }
}

}  // namespace torch_mlp

// What the kernels of linear_cross_entropy share on CPU and CUDA: their arguments, and which gradients are needed.
#pragma once

#include <optional>

#include "tensor.h"

namespace torch_mlp {

struct Needs {
  bool input, weight, bias;
  bool any() const { return input || weight || bias; }
};

// What both passes work on.
struct Arguments {
  Tensor input, linear_weight;
  std::optional<Tensor> linear_bias;
  Tensor target;
  std::optional<Tensor> weight;
};

inline Arguments contiguous_arguments(const Tensor& input, const Tensor& linear_weight,
                                      const std::optional<Tensor>& linear_bias, const Tensor& target,
                                      const std::optional<Tensor>& weight) {
  const auto contiguous = [](const std::optional<Tensor>& self) {
    return self ? std::optional(as_contiguous(*self)) : std::nullopt;
  };
  return {as_contiguous(input), as_contiguous(linear_weight), contiguous(linear_bias), as_contiguous(target),
          contiguous(weight)};
}

}  // namespace torch_mlp

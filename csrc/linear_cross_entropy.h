// What the kernels of linear_cross_entropy share on CPU and CUDA: their arguments, which gradients are needed, and the
// weight of a target.
#pragma once

#include <torch/headeronly/macros/Macros.h>

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

// What a target adds to the divisor of the mean. A wrong one adds nothing here, and is found where its loss is
// computed.
template <typename scalar_t>
C10_HOST_DEVICE double target_weight(int64_t label, const scalar_t* weight, int64_t classes, int64_t ignore_index) {
  const bool counts = label != ignore_index && label >= 0 && label < classes;
  return !counts ? 0.0 : weight ? double(compute_t<scalar_t>(weight[label])) : 1.0;
}

}  // namespace torch_mlp

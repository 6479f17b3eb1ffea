// The products of a linear layer on the CPU, of matrices and into matrices that are there: output and grad_input
// contiguous, grad_z with adjacent columns. accumulates: to what is there.
#pragma once

#include <optional>

#include "../activation.h"
#include "../tensor.h"

namespace torch_mlp {

// Activation: one of those of activation.h, Identity for none.
template <typename Activation>
void linear_act_out_cpu(const Tensor& output, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias);
void linear_grad_input_out_cpu(const Tensor& grad_input, const Tensor& grad_z, const Tensor& weight, bool accumulates);
void linear_grad_weight_out_cpu(const Tensor& grad_weight, const Tensor& grad_z, const Tensor& input, bool accumulates);

}  // namespace torch_mlp

// The op linear_act, for ops that are made of it.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "tensor.h"

namespace torch_mlp {

Tensor linear_act_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::string& activation);
std::tuple<Tensor, Tensor, Tensor> linear_act_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& weight, const Tensor& output,
                                                           const std::string& activation, bool needs_grad_input,
                                                           bool needs_grad_weight, bool needs_grad_bias);

#ifdef TORCH_MLP_WITH_CUDA
Tensor linear_act_cuda(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::string& activation);
std::tuple<Tensor, Tensor, Tensor> linear_act_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& weight, const Tensor& output,
                                                            const std::string& activation, bool needs_grad_input,
                                                            bool needs_grad_weight, bool needs_grad_bias);
#endif

}  // namespace torch_mlp

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

// Its products without activation, of matrices and into matrices that are there: output and grad_input contiguous,
// grad_z with adjacent columns. accumulates: to what is there.
void linear_out_cpu(const Tensor& output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias);
void linear_grad_input_out_cpu(const Tensor& grad_input, const Tensor& grad_z, const Tensor& weight, bool accumulates);
void linear_grad_weight_out_cpu(const Tensor& grad_weight, const Tensor& grad_z, const Tensor& input, bool accumulates);

#ifdef TORCH_MLP_WITH_CUDA
Tensor linear_act_cuda(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::string& activation);
std::tuple<Tensor, Tensor, Tensor> linear_act_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& weight, const Tensor& output,
                                                            const std::string& activation, bool needs_grad_input,
                                                            bool needs_grad_weight, bool needs_grad_bias);
#endif

}  // namespace torch_mlp

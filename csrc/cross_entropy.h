// The op cross_entropy, for ops that are made of it.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "tensor.h"

namespace torch_mlp {

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& input, const Tensor& target,
                                                     const std::optional<Tensor>& weight, const std::string& reduction,
                                                     int64_t ignore_index, double label_smoothing);
Tensor cross_entropy_backward_cpu(const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& input,
                                  const Tensor& target, const std::optional<Tensor>& weight, const Tensor& lse,
                                  const Tensor& total_weight, const std::string& reduction, int64_t ignore_index,
                                  double label_smoothing);

#ifdef TORCH_MLP_WITH_CUDA
std::tuple<Tensor, Tensor, Tensor> cross_entropy_cuda(const Tensor& input, const Tensor& target,
                                                      const std::optional<Tensor>& weight, const std::string& reduction,
                                                      int64_t ignore_index, double label_smoothing);
Tensor cross_entropy_backward_cuda(const Tensor& grad_output, const std::optional<Tensor>& grad_lse,
                                   const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                   const Tensor& lse, const Tensor& total_weight, const std::string& reduction,
                                   int64_t ignore_index, double label_smoothing);
#endif

}  // namespace torch_mlp

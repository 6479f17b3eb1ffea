// All layers of a multilayer perceptron in one op, on any device: a step of training calls it once for each direction.
//
//   forward     h_l = act(h_{l-1} W_l^T + b_l), h_0 = x, the last layer without activation
//   backward    (g_{l-1}, gW_l, gb_l) = the backward pass of layer l for g_l, from the last layer to the first
//
// Shapes: x (*, in_features), W_l (outs_l, outs_{l-1}), b_l (outs_l,), h_l (*, outs_l). Fused and threaded: each layer
// is linear_act, see there.
#include "linear_act.h"

namespace torch_mlp {
namespace {

const char* activation_of(size_t layer, size_t layers, const std::string& activation) {
  return layer + 1 == layers ? "identity" : activation.c_str();
}

// The outputs of every layer.
template <auto linear_act>
std::vector<Tensor> mlp(const Tensor& input, const std::vector<Tensor>& weights,
                        const std::vector<std::optional<Tensor>>& biases, const std::string& activation) {
  check(!weights.empty() && weights.size() == biases.size(), "mlp: expected as many biases, or None, as weights, got ",
        biases.size(), " and ", weights.size());
  std::vector<Tensor> outputs;
  for (size_t l = 0; l < weights.size(); ++l) {
    outputs.push_back(
        linear_act(l ? outputs.back() : input, weights[l], biases[l], activation_of(l, weights.size(), activation)));
  }
  return outputs;
}

// The gradient of input, then of each layer's weight and bias; needs_grad says in the same order which are needed, and
// those that are not come back empty.
template <auto linear_act_backward>
std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& outputs, const std::string& activation,
                                 const std::vector<int64_t>& needs_grad) {
  const size_t layers = weights.size();
  check(layers > 0 && outputs.size() == layers && needs_grad.size() == 1 + 2 * layers,
        "_mlp_backward: expected an output and two needs_grad for each of ", layers, " layers and one for input, got ",
        outputs.size(), " and ", needs_grad.size());
  // Below the first layer of which anything needs a gradient, nothing is to be done.
  size_t first = 0;
  while (first < needs_grad.size() && !needs_grad[first]) {
    ++first;
  }
  std::vector<Tensor> grads(needs_grad.size());
  Tensor grad = grad_output;
  for (size_t l = layers; l-- > 0;) {
    const bool passes_on = first < 1 + 2 * l;
    std::tie(grad, grads[1 + 2 * l], grads[2 + 2 * l]) = linear_act_backward(
        grad, l ? outputs[l - 1] : input, weights[l], outputs[l], activation_of(l, layers, activation), passes_on,
        needs_grad[1 + 2 * l] != 0, needs_grad[2 + 2 * l] != 0);
    if (!passes_on) {
      for (size_t i = 0; i < 1 + 2 * l; ++i) {
        grads[i] = empty({0}, input.scalar_type(), input);
      }
      return grads;
    }
  }
  grads[0] = grad;
  return grads;
}

}  // namespace
}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CPU, m) {
  m.impl("mlp", TORCH_BOX(&torch_mlp::mlp<torch_mlp::linear_act_cpu>));
  m.impl("_mlp_backward", TORCH_BOX(&torch_mlp::mlp_backward<torch_mlp::linear_act_backward_cpu>));
}

#ifdef TORCH_MLP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA, m) {
  m.impl("mlp", TORCH_BOX(&torch_mlp::mlp<torch_mlp::linear_act_cuda>));
  m.impl("_mlp_backward", TORCH_BOX(&torch_mlp::mlp_backward<torch_mlp::linear_act_backward_cuda>));
}
#endif

// Every operator of the package: its table of contents. Kernels register themselves, csrc/cpu/<op>.cpp for CPU tensors
// and csrc/cuda/<op>.cu for CUDA tensors; fake kernels and autograd live in torch_mlp/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_mlp, m) {
  // output = activation(input @ weight.T + bias), (*, in_features) -> (*, out_features)
  m.def("linear_act(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor");

  // (grad_input, grad_weight, grad_bias); one that is not needed comes back as an empty tensor
  m.def(
      "_linear_act_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output, str activation, "
      "bool needs_grad_input, bool needs_grad_weight, bool needs_grad_bias) -> (Tensor, Tensor, Tensor)");

  // the outputs of every layer of a multilayer perceptron, the last without activation
  m.def("mlp(Tensor input, Tensor[] weights, Tensor?[] biases, str activation) -> Tensor[]");

  // the gradients of input, and of weight and bias of each layer, in the order of needs_grad; one that is not needed
  // comes back as an empty tensor
  m.def(
      "_mlp_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor[] outputs, str activation, "
      "int[] needs_grad) -> Tensor[]");

  // (loss, lse, total_weight); lse (2, batch) holds each row's maximum and sum(exp(row - maximum))
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor, Tensor, Tensor)");

  // the same and, of one visit of the logits, their gradient for a grad_output of 1, of the loss of each row for "none"
  m.def(
      "_cross_entropy_with_gradient(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor, Tensor, Tensor, Tensor)");

  // grad_input from the saved lse and total_weight; grad_lse (batch,) is that of log(sum(exp(row)))
  m.def(
      "_cross_entropy_backward(Tensor grad_output, Tensor? grad_lse, Tensor input, Tensor target, Tensor? weight, "
      "Tensor lse, "
      "Tensor total_weight, str reduction, int ignore_index, float label_smoothing) -> Tensor");

  // the gradient that came with the loss becomes that of grad_output, (), in place
  m.def(
      "_cross_entropy_rescale_(Tensor(a!) gradient, Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
      "Tensor lse, Tensor total_weight, str reduction, int ignore_index, float label_smoothing) -> ()");

  // (loss, lse) of a number for each class, its probability mostly; target like input; lse as above
  m.def("cross_entropy_probabilities(Tensor input, Tensor target, str reduction) -> (Tensor, Tensor)");

  // (grad_input, grad_target); one that is not needed comes back as an empty tensor
  m.def(
      "_cross_entropy_probabilities_backward(Tensor grad_output, Tensor? grad_lse, Tensor input, Tensor target, Tensor "
      "lse, str reduction, bool needs_grad_input, bool needs_grad_target) -> (Tensor, Tensor)");

  // cross_entropy of linear_act without activation, whose output never is there as a whole: loss (like lse), lse and
  // total_weight as above, and, where they are needed and the reduction is not none, the gradients of input,
  // linear_weight and linear_bias for a grad_output of 1, else empty tensors
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
      "str reduction, int ignore_index, float label_smoothing, bool needs_grad_input, bool needs_grad_weight, bool "
      "needs_grad_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // (grad_input, grad_weight, grad_bias); one that is not needed comes back as an empty tensor
  m.def(
      "_linear_cross_entropy_backward(Tensor grad_output, Tensor? grad_lse, Tensor input, Tensor linear_weight, "
      "Tensor? "
      "linear_bias, Tensor target, Tensor? weight, Tensor lse, Tensor total_weight, str reduction, int ignore_index, "
      "float label_smoothing, bool needs_grad_input, bool needs_grad_weight, bool needs_grad_bias) -> (Tensor, Tensor, "
      "Tensor)");

  // the loss; weight and pos_weight are broadcast to the shape of input
  m.def(
      "binary_cross_entropy_with_logits(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "str reduction) -> Tensor");

  // (grad_input, grad_target); one that is not needed comes back as an empty tensor
  m.def(
      "_binary_cross_entropy_with_logits_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
      "Tensor? pos_weight, str reduction, bool needs_grad_input, bool needs_grad_target) -> (Tensor, Tensor)");

  // minibatch SGD over the images in that order, which moves weights, biases and velocities (of each layer its weight's
  // and its bias's; none without momentum); a mean loss and an lr for each minibatch
  m.def(
      "_train_epoch(Tensor images, Tensor labels, Tensor order, Tensor(a!)[] weights, Tensor(b!)[] biases, "
      "Tensor(c!)[] velocities, str[] activations, int batch_size, Tensor lr, float momentum, float weight_decay, "
      "float scale, float shift, bool bfloat16) -> Tensor");

  // the instruction set of the CPU's vector kernels: default, avx2, avx512, avx512_bf16 or amx
  m.def("_cpu_capability() -> str");

  // the time of that many rounds of multiplications and additions on every thread gives the processor's peak; returns
  // their number
  m.def("_cpu_multiply_adds(int threads, int rounds) -> int");

  // the same of float32 in parts by a matrix unit; 0 where there is none
  m.def("_cpu_split_multiply_adds(int threads, int rounds) -> int");
}

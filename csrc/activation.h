// The activation functions, one struct each, used by the CPU and the CUDA kernels alike.
//
//   forward(z)              y = act(z)
//   backward(grad, y)       grad * act'(z), with act'(z) expressed through the OUTPUT y
//
// An activation is admitted only if its derivative can be expressed through its output: then the backward pass needs
// the output, which the next layer holds anyway, and never the pre-activation z.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <string>

#include "checks.h"

namespace torch_mlp {

struct Identity {
  static constexpr const char* name = "identity";
  template <typename T>
  C10_HOST_DEVICE static T forward(T z) {
    return z;
  }
  template <typename T>
  C10_HOST_DEVICE static T backward(T grad, T) {
    return grad;
  }
};

struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  template <typename T>
  C10_HOST_DEVICE static T forward(T z) {
    return T(1) / (T(1) + std::exp(-z));
  }
  template <typename T>
  C10_HOST_DEVICE static T backward(T grad, T y) {
    return grad * (T(1) - y) * y;
  }
};

struct Tanh {
  static constexpr const char* name = "tanh";
  template <typename T>
  C10_HOST_DEVICE static T forward(T z) {
    return std::tanh(z);
  }
  template <typename T>
  C10_HOST_DEVICE static T backward(T grad, T y) {
    return grad * (T(1) - y * y);
  }
};

struct ReLU {
  static constexpr const char* name = "relu";
  // Both comparisons are false for NaN, so that NaN passes through as it does in torch; the derivative at 0 is 0.
  template <typename T>
  C10_HOST_DEVICE static T forward(T z) {
    return z < T(0) ? T(0) : z;
  }
  template <typename T>
  C10_HOST_DEVICE static T backward(T grad, T y) {
    return y <= T(0) ? T(0) : grad;
  }
};

// Calls body(Activation{}) for the activation of that name.
template <typename Body>
void dispatch_activation(const char* op, const std::string& name, const Body& body) {
  if (name == Identity::name) {
    body(Identity{});
  } else if (name == Sigmoid::name) {
    body(Sigmoid{});
  } else if (name == Tanh::name) {
    body(Tanh{});
  } else if (name == ReLU::name) {
    body(ReLU{});
  } else {
    check<std::invalid_argument>(false, op, ": expected activation to be one of identity, sigmoid, tanh, relu, got '",
                                 name, "'");
  }
}

}  // namespace torch_mlp

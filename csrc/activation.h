// The activation functions, one struct each, used by the CPU and the CUDA kernels alike.
//
//   forward(z)              y = act(z)
//   backward(grad, y)       grad * act'(z), with act'(z) expressed through the OUTPUT y
//
// An activation is admitted only if its derivative can be expressed through its output: then the backward pass needs
// the output, which the next layer holds anyway, and never the pre-activation z. Step has no backward pass: where one
// is asked for, dispatch_differentiable refuses, for gradients that are all 0 would look as if there was nothing to
// learn.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <string>
#include <type_traits>

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

struct Step {
  static constexpr const char* name = "step";
  // 1 from 0 on, which -0 is too; NaN passes through.
  template <typename T>
  C10_HOST_DEVICE static T forward(T z) {
    return z < T(0) ? T(0) : z >= T(0) ? T(1) : z;
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
  } else if (name == Step::name) {
    body(Step{});
  } else {
    check(false, op, ": expected activation to be one of identity, sigmoid, tanh, relu, step, got '", name, "'");
  }
}

// The same for a backward pass. The sentence is also in torch_mlp/ops/linear_act.py.
template <typename Body>
void dispatch_differentiable(const char* op, const std::string& name, const Body& body) {
  dispatch_activation(op, name, [&](auto act) {
    if constexpr (std::is_same_v<decltype(act), Step>) {
      check(
          false, op,
          ": expected an activation with a derivative, got step, which is constant but for a jump at 0: its derivative "
          "is 0 wherever it has one, so that gradient descent cannot use it; use sigmoid, tanh or relu");
    } else {
      body(act);
    }
  });
}

}  // namespace torch_mlp

// The vector kernels by torch's C++ types: float and BFloat16 have them; double and Half take plain loops. And the
// activations as the kernels name them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <type_traits>

#include "../activation.h"
#include "kernels.h"

namespace torch_mlp {

template <typename Activation>
constexpr ActivationKind kind_of = std::is_same_v<Activation, Identity>  ? ActivationKind::Identity
                                   : std::is_same_v<Activation, Sigmoid> ? ActivationKind::Sigmoid
                                   : std::is_same_v<Activation, Tanh>    ? ActivationKind::Tanh
                                   : std::is_same_v<Activation, ReLU>    ? ActivationKind::ReLU
                                                                         : ActivationKind::Step;

template <typename scalar_t>
constexpr bool has_vector_kernels =
    std::is_same_v<scalar_t, float> || std::is_same_v<scalar_t, torch::headeronly::BFloat16>;

template <typename scalar_t>
const auto& elementwise_kernels() {
  static_assert(has_vector_kernels<scalar_t>);
  if constexpr (std::is_same_v<scalar_t, float>) {
    return kernels().elementwise_float;
  } else {
    return kernels().elementwise_bfloat16;
  }
}

template <typename scalar_t>
const auto& softmax_kernels() {
  static_assert(has_vector_kernels<scalar_t>);
  if constexpr (std::is_same_v<scalar_t, float>) {
    return kernels().softmax_float;
  } else {
    return kernels().softmax_bfloat16;
  }
}

template <typename scalar_t>
const auto& logistic_kernels() {
  static_assert(has_vector_kernels<scalar_t>);
  if constexpr (std::is_same_v<scalar_t, float>) {
    return kernels().logistic_float;
  } else {
    return kernels().logistic_bfloat16;
  }
}

// A pointer as the vector kernels take it.
inline const float* bits_of(const float* pointer) { return pointer; }
inline float* bits_of(float* pointer) { return pointer; }
inline const bfloat16_bits* bits_of(const torch::headeronly::BFloat16* pointer) {
  return reinterpret_cast<const bfloat16_bits*>(pointer);
}
inline bfloat16_bits* bits_of(torch::headeronly::BFloat16* pointer) {
  return reinterpret_cast<bfloat16_bits*>(pointer);
}

}  // namespace torch_mlp

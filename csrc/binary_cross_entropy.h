// Binary cross-entropy of one logit x with target y, for CPU and CUDA alike, and how the weights repeat.
//
//   t = log(1 + exp(-|x|))      softplus(x) = max(x, 0) + t      softplus(-x) = max(-x, 0) + t
//   loss           (1 - y) softplus(x) + p y softplus(-x)
//   d loss / dx    (1 - y) sigmoid(x) - p y sigmoid(-x)
//   d loss / dy    p softplus(-x) - softplus(x)
//
// p is the weight of the positive class, 1 where none is given. Written so, no digits cancel for any x while y is
// between 0 and 1, and exp never overflows.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <vector>

#include "tensor.h"

namespace torch_mlp {

template <typename T>
C10_HOST_DEVICE T binary_cross_entropy(T x, T y, T p) {
  const T distance = std::fabs(x), t = std::log1p(std::exp(-distance)), below = x < 0 ? x : T(0);
  const T positive = p * y, negative = T(1) - y;
  // below - below is NaN where x is -inf, as in torch, and 0 elsewhere.
  return (negative + positive) * t + (x < 0 ? positive : negative) * distance + (below - below);
}

template <typename T>
C10_HOST_DEVICE T binary_cross_entropy_by_input(T x, T y, T p) {
  const T u = std::exp(-std::fabs(x)), near = T(1) / (T(1) + u), far = u * near;
  return (T(1) - y) * (x < 0 ? far : near) - p * y * (x < 0 ? near : far);
}

// Without pos_weight exactly -x.
template <typename T>
C10_HOST_DEVICE T binary_cross_entropy_by_target(T x, T p) {
  const T t = std::log1p(std::exp(-std::fabs(x)));
  return (x < 0 ? p * -x : -x) + (p - T(1)) * t;
}

// What a tensor holds that is broadcast to the shape of input: contiguous elements that repeat, so that element i of
// input has the one at i % numel. (C,) for (N, C) stays as it is, and so does a scalar; (C, 1) is written out to (C, D)
// for (N, C, D). Dimensions that were expanded already, as those of the gradient of a sum, are taken back.
inline Tensor repeating_part(const Tensor& self, const Tensor& input) {
  const auto repeats = [&](int64_t d) { return self.size(d) == 1 || self.stride(d) == 0; };
  int64_t first = 0;
  while (first < self.dim() && repeats(first)) {
    ++first;
  }
  std::vector<int64_t> sizes, strides;
  for (int64_t d = first; d < self.dim(); ++d) {
    sizes.push_back(input.size(input.dim() - self.dim() + d));
    strides.push_back(repeats(d) ? 0 : self.stride(d));
  }
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(self.get(), int64_t(sizes.size()), sizes.data(), strides.data(), 0, &view));
  return as_contiguous(Tensor(view));
}

}  // namespace torch_mlp

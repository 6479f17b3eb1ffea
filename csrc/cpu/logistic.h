// Binary cross-entropy of logits, as in ../binary_cross_entropy.h, in vectors. For level.h.
#pragma once

#include "exp.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// log(1 + u) for u from 0 to 1, and NaN: 2 artanh(s) with s = u / (2 + u), exact for small u too.
TORCH_MLP_INLINE vec log1p(vec u) {
  const vec s = u * reciprocal(2.0f + u), z = s * s;
  // artanh(s) = s + s z series. Of degree 3, such that the largest error, 5e-9 of the result, is the least.
  vec series = z * 0.140059934f + 0.140009026f;
  series = series * z + 0.200107636f;
  series = series * z + 0.333332081f;
  const vec twice = 2.0f * s;
  return twice * (z * series) + twice;
}

TORCH_MLP_INLINE vec absolute(vec x) { return (vec)((vec_int)x & INT32_MAX); }

// A vector of a tensor, or of ones where there is none.
template <bool is_whole, typename T>
TORCH_MLP_INLINE vec load_or_one(const T* from, int64_t i, int64_t count) {
  return from ? load_some<is_whole>(from + i, count) : broadcast(1.0f);
}

template <bool is_whole, typename T>
TORCH_MLP_INLINE vec logistic_loss_of_vector(const LogisticLoss<T>& of, int64_t i, int64_t count) {
  const vec x = load_some<is_whole>(of.x + i, count), y = load_some<is_whole>(of.y + i, count);
  const vec positive = load_or_one<is_whole>(of.pos_weight, i, count) * y, negative = 1.0f - y;
  const vec distance = absolute(x), t = log1p(exp_below_overflow(-distance)), below = x < 0.0f ? x : vec{};
  const vec value = (negative + positive) * t + (x < 0.0f ? positive : negative) * distance + (below - below);
  return load_or_one<is_whole>(of.weight, i, count) * value;
}

template <typename T>
double logistic_loss(const LogisticLoss<T>& of, T* loss) {
  DoubleSum sum;
  const int64_t whole = whole_vectors(of.count), left = of.count - whole;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vec value = logistic_loss_of_vector<true>(of, i, kLanes);
    sum.add(value);
    if (loss) {
      store(loss + i, value);
    }
  }
  if (left) {
    const vec value = logistic_loss_of_vector<false>(of, whole, left);
    sum.add(first_lanes(value, left, vec{}));
    if (loss) {
      store_part(loss + whole, value, left);
    }
  }
  return sum.total();
}

template <bool is_whole, typename T>
TORCH_MLP_INLINE void logistic_gradient_of_vector(const LogisticLoss<T>& of, const T* grad_output, float scale,
                                                  T* grad_x, T* grad_y, int64_t i, int64_t count) {
  const vec x = load_some<is_whole>(of.x + i, count), p = load_or_one<is_whole>(of.pos_weight, i, count);
  const vec factor = scale * load_or_one<is_whole>(grad_output, i, count) * load_or_one<is_whole>(of.weight, i, count);
  const vec u = exp_below_overflow(-absolute(x));
  if (grad_x) {
    const vec y = load_some<is_whole>(of.y + i, count);
    const vec near = reciprocal(1.0f + u), far = u * near;
    const vec value = (1.0f - y) * (x < 0.0f ? far : near) - p * y * (x < 0.0f ? near : far);
    store_some<is_whole>(grad_x + i, factor * value, count);
  }
  if (grad_y) {
    const vec value = (x < 0.0f ? p * -x : -x) + (p - 1.0f) * log1p(u);
    store_some<is_whole>(grad_y + i, factor * value, count);
  }
}

template <typename T>
void logistic_gradient(const LogisticLoss<T>& of, const T* grad_output, float scale, T* grad_x, T* grad_y) {
  const int64_t whole = whole_vectors(of.count);
  for (int64_t i = 0; i < whole; i += kLanes) {
    logistic_gradient_of_vector<true>(of, grad_output, scale, grad_x, grad_y, i, kLanes);
  }
  if (whole < of.count) {
    logistic_gradient_of_vector<false>(of, grad_output, scale, grad_x, grad_y, whole, of.count - whole);
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

// exp, log and the activations of vectors. For level.h.
#pragma once

#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// --- exp and log ---

template <int count, typename Step>
TORCH_MLP_INLINE void for_each(const Step& step) {
  TORCH_MLP_UNROLL
  for (int j = 0; j < count; ++j) {
    step(j);
  }
}

// exp(x) = 2^n (1 + r + r^2 p), with n the integer nearest to x / log 2 and r the rest, |r| <= log(2) / 2. Of several
// vectors one step at a time: the steps of one wait for each other, and if they came first, so would the next vector's.
template <int count>
struct ExpParts {
  vec n[count], r[count], p[count];
  vec_uint power[count];  // the bits of 2^n, modulo 2^32 where that is no normal float
};

template <int count>
TORCH_MLP_INLINE ExpParts<count> split_exp(const vec (&x)[count]) {
  ExpParts<count> parts;
  auto &n = parts.n, &r = parts.r, &p = parts.p;
  // Adding 1.5 * 2^23 rounds to an integer, and with 127 more its lowest bits are the exponent of 2^n. log(2) is
  // subtracted in two parts, of which n times the first is exact (Cody and Waite, Software Manual for the Elementary
  // Functions, 1980, chapter 6).
  constexpr float to_integer = 12582912.0f + 127;
  for_each<count>([&](int j) { n[j] = x[j] * 1.44269504f + to_integer; });
  for_each<count>([&](int j) { parts.power[j] = (vec_uint)n[j] << 23; });
  for_each<count>([&](int j) { n[j] -= to_integer; });
  for_each<count>([&](int j) { r[j] = x[j] - n[j] * 0.693145752f; });
  for_each<count>([&](int j) { r[j] -= n[j] * 1.42860677e-6f; });
  // Of degree 4, such that the largest error, 3e-9 of exp(r), is the least.
  for_each<count>([&](int j) { p[j] = r[j] * 1.38212356e-3f + 8.36866629e-3f; });
  for_each<count>([&](int j) { p[j] = p[j] * r[j] + 4.16682586e-2f; });
  for_each<count>([&](int j) { p[j] = p[j] * r[j] + 1.66665211e-1f; });
  for_each<count>([&](int j) { p[j] = p[j] * r[j] + 4.9999994e-1f; });
  return parts;
}

// value 2^n, with the bits of 2^n.
TORCH_MLP_INLINE vec scale_by_power_of_two(vec value, [[maybe_unused]] vec n, [[maybe_unused]] vec_uint power) {
#if TORCH_MLP_LANES == 16
  return (vec)_mm512_maskz_scalef_ps(0xffff, (__m512)value, (__m512)n);
#else
  return value * (vec)(power + (64u << 23)) * 0x1p-64f;  // 2^n itself may lie below the range of float
#endif
}

// exp(x) of each, in its place, for x <= 43, and NaN.
template <int count>
TORCH_MLP_INLINE void exp_below_overflow(vec (&x)[count]) {
  for_each<count>([&](int j) { x[j] = maximum_of(broadcast(-104.0f), x[j]); });  // exp(-104) is 0
  const auto parts = split_exp(x);
  const auto &r = parts.r, &p = parts.p;
  for_each<count>([&](int j) { x[j] = p[j] * r[j] + 1.0f; });
  for_each<count>([&](int j) { x[j] = x[j] * r[j] + 1.0f; });
  for_each<count>([&](int j) { x[j] = scale_by_power_of_two(x[j], parts.n[j], parts.power[j]); });
}

TORCH_MLP_INLINE vec exp_below_overflow(vec x) {
  vec one[1] = {x};
  exp_below_overflow(one);
  return one[0];
}

// log(x) for finite x >= 1, and NaN.
TORCH_MLP_INLINE vec log(vec x) {
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 artanh(s) with s = (m - 1) / (m + 1).
  constexpr int32_t bits_of_sqrt_half = 0x3f3504f3;
  const vec_int n = ((vec_int)x - bits_of_sqrt_half) >> 23;
  const vec m = (vec)((vec_int)x - (n << 23));
  const vec s = (m - 1.0f) / (m + 1.0f), z = s * s;
  vec series = z * (2.0f / 9) + 2.0f / 7;
  series = series * z + 2.0f / 5;
  series = series * z + 2.0f / 3;
  const vec n_float = __builtin_convertvector(n, vec);
  const vec low = n_float * 1.42860677e-6f + s * z * series;
  return (n_float * 0.693145752f + (low + 2.0f * s)) + (x - x);  // x - x is NaN for NaN, else 0
}

// --- activations, as in ../activation.h ---

// 1 / x for x from 1 to 4.
TORCH_MLP_INLINE vec reciprocal(vec x) {
#if TORCH_MLP_LANES == 16
  const vec guess = (vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // of 14 bits, which a step of Newton's doubles
  return guess * (1.0f - x * guess) + guess;
#else
  return 1.0f / x;
#endif
}

// By t = exp(-|z|), which cannot overflow: 1 / (1 + t), and t / (1 + t) for negative z.
TORCH_MLP_INLINE vec sigmoid(vec z) {
  const vec t = exp_below_overflow((vec)((vec_int)z | INT32_MIN)), y = reciprocal(1.0f + t);
  return z < 0.0f ? t * y : y;
}

// With t = exp(-2 |z|): (1 - t) / (1 + t) near 0, where 1 - t is known as -(2^n q + (2^n - 1)) to all its digits, and
// 1 - 2 t / (1 + t) away from it, where the 1 is exact.
TORCH_MLP_INLINE vec tanh(vec z) {
  const vec_int sign = (vec_int)z & INT32_MIN;
  vec x = -2.0f * (vec)((vec_int)z ^ sign);
  x = x < -40.0f ? broadcast(-40.0f) : x;  // there tanh is 1
  const vec one[1] = {x};
  const auto parts = split_exp(one);
  const vec r = parts.r[0], q = parts.p[0] * (r * r) + r;  // exp(r) - 1
  const vec power = (vec)parts.power[0], t = power * q + power;
  const vec_int is_near = x > -1.1f;
  const vec quotient = (is_near ? -(power * q + (power - 1.0f)) : -2.0f * t) / (1.0f + t);
  return (vec)((vec_int)(quotient + (is_near ? vec{} : broadcast(1.0f))) | sign);
}

template <ActivationKind kind>
TORCH_MLP_INLINE vec activation(vec z) {
  if constexpr (kind == ActivationKind::Sigmoid) {
    return sigmoid(z);
  } else if constexpr (kind == ActivationKind::Tanh) {
    return tanh(z);
  } else if constexpr (kind == ActivationKind::ReLU) {
    return z < 0.0f ? vec{} : z;  // false for NaN, which passes
  } else if constexpr (kind == ActivationKind::Step) {
    return z < 0.0f ? vec{} : z >= 0.0f ? broadcast(1.0f) : z;  // here too
  } else {
    return z;
  }
}

template <ActivationKind kind>
TORCH_MLP_INLINE vec activation_gradient(vec grad, vec y) {
  if constexpr (kind == ActivationKind::Sigmoid) {
    return grad * (1.0f - y) * y;
  } else if constexpr (kind == ActivationKind::Tanh) {
    return grad * (1.0f - y * y);
  } else if constexpr (kind == ActivationKind::ReLU) {
    return y <= 0.0f ? vec{} : grad;
  } else if constexpr (kind == ActivationKind::Step) {
    return vec{};  // the derivative where there is one; nobody gets here, see dispatch_differentiable
  } else {
    return grad;
  }
}

template <ActivationKind kind>
struct Activation {
  static constexpr ActivationKind value = kind;
};

// Calls body with the Activation of that kind: one comparison for a whole loop.
template <typename Body>
TORCH_MLP_INLINE void dispatch(ActivationKind kind, const Body& body) {
  switch (kind) {
    case ActivationKind::Identity:
      return body(Activation<ActivationKind::Identity>{});
    case ActivationKind::Sigmoid:
      return body(Activation<ActivationKind::Sigmoid>{});
    case ActivationKind::Tanh:
      return body(Activation<ActivationKind::Tanh>{});
    case ActivationKind::ReLU:
      return body(Activation<ActivationKind::ReLU>{});
    case ActivationKind::Step:
      return body(Activation<ActivationKind::Step>{});
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

// Multiplications and additions that wait for nothing: what scripts/bench.py measures the kernels against. For level.h.
#pragma once

#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

constexpr int kChains = 12;  // enough that none waits for the one before
constexpr int64_t kMultiplyAddsOfRound = kChains * kLanes;

// Gives a number that depends on all of them, so that the compiler leaves none out.
float multiply_adds(int64_t rounds) {
  vec sum[kChains];
  TORCH_MLP_UNROLL
  for (int j = 0; j < kChains; ++j) {
    sum[j] =
        broadcast(-float(j));  // equal chains would be computed once, and one of ones, which they tend to, not once
  }
  const vec factor = broadcast(0.999f), term = broadcast(0.001f);
  for (int64_t i = 0; i < rounds; ++i) {
    TORCH_MLP_UNROLL
    for (int j = 0; j < kChains; ++j) {
      sum[j] = sum[j] * factor + term;
    }
  }
  TORCH_MLP_UNROLL
  for (int j = 1; j < kChains; ++j) {
    sum[0] += sum[j];
  }
  return sum[0][0];
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

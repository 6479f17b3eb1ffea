// Multiplications and additions that wait for nothing: what scripts/bench.py measures the kernels against. For level.h.
#pragma once

#include "vector.h"
#if defined(TORCH_MLP_HAS_AMX)
#include "unit_multiply.h"
#endif

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

#if defined(TORCH_MLP_HAS_AMX)
// The same by the matrix unit: products of tiles that wait for nothing, as many as a step of multiply_bands has. Of
// numbers like any others, for the unit multiplies zeros faster.
constexpr int64_t kSplitMultiplyAddsOfRound = kBand * kBand * kTileDepth;

float split_multiply_adds(int64_t rounds) {
  bfloat16_pair operands[4 * kTilePairs];
  uint32_t random = 1;
  for (bfloat16_pair& pair : operands) {
    random = random * 1664525 + 1013904223;
    pair.bits = (random & 0x80ff80ff) | 0x3e003e00;
  }
  float sums[kTilePairs];
  _tile_loadconfig(&kTileShapes);
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, operands, kTileRowBytes);
  _tile_loadd(5, operands + kTilePairs, kTileRowBytes);
  _tile_loadd(6, operands + 2 * kTilePairs, kTileRowBytes);
  _tile_loadd(7, operands + 3 * kTilePairs, kTileRowBytes);
  for (int64_t i = 0; i < kGroupsOfStep<float> * rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kTileRowBytes);
  _tile_release();
  return sums[0];
}
#endif

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

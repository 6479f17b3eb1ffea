// What the matrix unit of Intel's processors, AMX, multiplies: tiles of pairs of bfloat16. split_floats.h and
// pair_bfloat16.h fill them, unit_multiply.h multiplies. For level.h.
#pragma once

#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// A tile of the unit: kTileSide rows of so many pairs of bfloat16, or floats. An operand's tile has kTileDepth of the
// depth: in a lie the pairs of a row beside each other, in b those of a column below each other.
constexpr int kTileSide = kLanes;
constexpr int64_t kTilePairs = kTileSide * kTileSide, kTileDepth = 2 * kTileSide;
constexpr int64_t kTileRowBytes = kTileSide * sizeof(float);
// Rows of a, or columns of b, of two tiles: with both, four tiles of sums, and room for two of a and two of b.
constexpr int64_t kBand = 2 * kTileSide;
// Of a band: for each kTileDepth of the depth the two tiles, or those of the first part, of the second and of the
// third.
template <typename T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;
constexpr int64_t kPartPairs = 2 * kTilePairs;
template <typename T>
constexpr int64_t kStepPairs = kParts<T> * kPartPairs;

// An operand: element p along the depth of a line, a row of a or a column of b. One of the strides is 1.
template <typename T>
struct Lines {
  const T* data;
  int64_t line_stride, depth_stride;

  TORCH_MLP_INLINE Lines from(int64_t line, int64_t p) const {
    return {data + line * line_stride + p * depth_stride, line_stride, depth_stride};
  }
};

template <typename T>
Lines<T> lines_of(Rows<const T> matrix, bool are_columns) {
  return are_columns ? Lines<T>{matrix.data, 1, matrix.stride} : Lines<T>{matrix.data, matrix.stride, 1};
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

// Operands of products of bfloat16 in the order in which the matrix unit wants them: pairs of adjacent elements along
// the depth. For level.h.
#pragma once

#include "unit_tiles.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// A vector of pairs as they lie in memory: of line i, or of all lines at 2 i and 2 i + 1 of the depth; with zeros
// beyond lines and depth where they are not those of a whole tile.
template <bool rows_are_lines, bool is_whole>
TORCH_MLP_INLINE vec load_pairs(const Lines<bfloat16_bits>& of, int64_t i, int64_t lines, int64_t depth) {
  if constexpr (rows_are_lines) {
    const int64_t count = i < lines ? max(0, min(depth, kTileDepth)) : 0;
    const bfloat16_bits* const from = of.data + i * of.line_stride;
    return is_whole ? load(reinterpret_cast<const bfloat16_pair*>(from))
                    : (vec)_mm512_maskz_loadu_epi16(__mmask32((int64_t(1) << count) - 1), from);
  } else {
    const auto row = [&](int64_t p) {
      return load_some<is_whole>(of.data + p * of.depth_stride, p < depth ? max(0, min(lines, kTileSide)) : 0);
    };
    return exact_pairs_of(row(2 * i), row(2 * i + 1));
  }
}

// The tile of `depth` of `lines`, or of as much of them as a tile holds.
template <bool is_a, bool is_transposed, bool is_whole>
TORCH_MLP_INLINE vec_uint fill_tile(const Lines<bfloat16_bits>& of, int64_t lines, int64_t depth, bfloat16_pair* to,
                                    vec_uint most) {
  vec square[kTileSide];
  TORCH_MLP_UNROLL
  for (int i = 0; i < kTileSide; ++i) {
    square[i] = load_pairs<is_a != is_transposed, is_whole>(of, i, lines, depth);
  }
  if constexpr (is_transposed) {
    transpose(square);
  }
  TORCH_MLP_UNROLL
  for (int i = 0; i < kTileSide; ++i) {
    store(to + i * kTileSide, square[i]);
  }
  return most;
}

// Vector i of a whole tile whose operand lies in memory as it does there.
template <bool is_a>
TORCH_MLP_INLINE vec_uint fill_vector(const Lines<bfloat16_bits>& of, int64_t i, bfloat16_pair* to, vec_uint most) {
  store(to + i * kTileSide, load_pairs<is_a, true>(of, i, kTileSide, kTileDepth));
  return most;
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

// A float in three bfloat16 that add up to it exactly, and operands of products so split, in the order in which AMX,
// the matrix unit of Intel's processors, wants them (gemm_amx.h):
//
//   x = x0 + x1 + x2        x0 = x, rounded to the 8 bits of a bfloat16; x1 = x - x0, cut to 8 bits; x2 = x - x0 - x1
//   x y = x0 y0 + x0 y1 + x1 y0 + x0 y2 + x1 y1 + x2 y0       but for 2^-23 |x y| at most, mostly less than 2^-26
//
// (Henry, Tang and Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision
// Computations, 2019.)
//
// The unit takes subnormal numbers for 0, and an infinity has no such parts. So the sum is said not to be exact where
// the largest of the numbers that are split together is neither 0 nor between 2^-48 and 2^48: elsewhere what is taken
// for 0 is less than 2^-78 of the largest. For level.h.
#pragma once

#include "unit_tiles.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// The larger ones of two vectors of bfloat16 without their signs, which are doubled so.
TORCH_MLP_INLINE vec_uint larger(vec_uint doubled, vec_uint pairs) {
  const __m512i shifted = _mm512_add_epi16((__m512i)pairs, (__m512i)pairs);
  return (vec_uint)_mm512_maskz_max_epu16(0xffffffff, (__m512i)doubled, shifted);
}

// The parts of the pairs (x, y), each to a tile of its own.
TORCH_MLP_INLINE vec_uint split_pairs(vec x, vec y, bfloat16_pair* to, vec_uint most) {
  const auto upper_half = [&](vec_uint bits) { return (vec)(bits & 0xffff0000); };
  // Rounded, ties away from 0. What is left may have either sign.
  const vec x0 = upper_half((vec_uint)x + 0x8000), y0 = upper_half((vec_uint)y + 0x8000);
  const vec first = exact_pairs_of(x0, y0);
  store(to, first);
  x -= x0;
  y -= y0;
  const vec x1 = upper_half((vec_uint)x), y1 = upper_half((vec_uint)y);
  store(to + kPartPairs, exact_pairs_of(x1, y1));
  // What is left has no lower half, unless it is subnormal.
  store(to + 2 * kPartPairs, exact_pairs_of(x - x1, upper_half((vec_uint)(y - y1))));
  return larger(most, (vec_uint)first);
}

// Row i of a matrix of (rows, cols), of which a vector's width is read, with zeros beyond where it is not whole.
template <bool is_whole>
TORCH_MLP_INLINE vec load_row(Rows<const float> of, int64_t i, int64_t rows, int64_t cols) {
  const bool is_there = is_whole || (i < rows && cols > 0);
  return is_there ? load_some<is_whole>(of.data + i * of.stride, min(cols, kTileSide)) : vec{};
}

template <bool is_whole>
TORCH_MLP_INLINE void load_transposed(Rows<const float> of, int64_t rows, int64_t cols, vec (&square)[kTileSide]) {
  TORCH_MLP_UNROLL
  for (int i = 0; i < kTileSide; ++i) {
    square[i] = load_row<is_whole>(of, i, rows, cols);
  }
  transpose(square);
}

// The tiles, one for each part, of `depth` of `lines`, or of as much of them as a tile holds.
template <bool is_a, bool is_transposed, bool is_whole>
TORCH_MLP_INLINE vec_uint fill_tile(const Lines<float>& of, int64_t lines, int64_t depth, bfloat16_pair* to,
                                    vec_uint most) {
  constexpr bool rows_are_lines = is_a != is_transposed;  // as they lie in memory
  const int64_t stride = rows_are_lines ? of.line_stride : of.depth_stride, second_depth = depth - kTileSide;
  const int64_t rows = rows_are_lines ? lines : depth, cols = rows_are_lines ? depth : lines;
  const int64_t second_rows = rows_are_lines ? lines : second_depth,
                second_cols = rows_are_lines ? second_depth : lines;
  const Rows<const float> first{of.data, stride}, second{of.from(0, kTileSide).data, stride};
  vec x[kTileSide], y[kTileSide];
  if constexpr (is_transposed) {
    load_transposed<is_whole>(first, rows, cols, x);
    load_transposed<is_whole>(second, second_rows, second_cols, y);
  }
  TORCH_MLP_UNROLL
  for (int i = 0; i < kTileSide; ++i) {
    if constexpr (!is_transposed) {
      x[i] = load_row<is_whole>(first, i, rows, cols);
      y[i] = load_row<is_whole>(second, i, second_rows, second_cols);
    }
    most = split_pairs(x[i], y[i], to + i * kTileSide, most);
  }
  return most;
}

// Vector i of the tiles, one for each part, of a whole tile's operand that lies in memory as it does there.
template <bool is_a>
TORCH_MLP_INLINE vec_uint fill_vector(const Lines<float>& of, int64_t i, bfloat16_pair* to, vec_uint most) {
  const Lines<float> x = is_a ? of.from(i, 0) : of.from(0, i);
  return split_pairs(load(x.data), load(x.from(0, kTileSide).data), to + i * kTileSide, most);
}

// Whether the parts can do for these operands, see above.
bool are_exact(vec_uint most) {
  uint16_t largest = 0, each[2 * kLanes];
  memcpy(each, &most, sizeof(each));
  for (const uint16_t value : each) {
    largest = value > largest ? value : largest;
  }
  constexpr uint16_t least = (127 - 48) << 8, too_large = (127 + 48) << 8;  // 2^-48 and 2^48 in bfloat16, doubled
  return largest == 0 || (largest >= least && largest < too_large);
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

// Products of float matrices by AMX, the matrix unit of Intel's processors since Sapphire Rapids. It multiplies
// bfloat16 and sums in float; a float is split for it into three bfloat16 that add up to it exactly:
//
//   x = x0 + x1 + x2        x0 = x, x1 = x - x0, rounded to 8 bits each, x2 = x - x0 - x1
//   x y = x0 y0 + x0 y1 + x1 y0 + x0 y2 + x1 y1 + x2 y0       but for less than 2^-23 |x y|, mostly less than 2^-26
//
// Six products of bfloat16 take 6/16 of the time of one product of float, and the sums have no more rounding errors
// (Henry, Tang and Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision
// Computations, 2019).
//
// The unit takes subnormal numbers for 0, and the split of an infinity is none. So where the largest of an operand's
// part is neither 0 nor between 2^-48 and 2^48 the tiles of gemm.h compute that part's products: elsewhere what is
// taken for 0 is less than 2^-78 of the largest.
//
// A task is a band of c. Both operands are split a part of the depth at a time: a for a block of rows, b band by band,
// so that they stay in the second-level cache. For level.h.
#pragma once

#include "gemm.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// A tile of the unit: kTileSide rows of so many pairs of bfloat16, or floats. An operand's tile has kTileDepth of the
// depth: in a lie the pairs of a row beside each other, in b those of a column below each other. A pair is of elements
// kTileSide apart, so that it is made of two whole vectors.
constexpr int kTileSide = kLanes;
constexpr int64_t kTilePairs = kTileSide * kTileSide, kTileDepth = 2 * kTileSide;
// Rows of a, or columns of b, of two tiles: with both, four tiles of sums, and room for two of a and two of b.
constexpr int64_t kBand = 2 * kTileSide;
constexpr int kParts = 3;  // of a float
// Of a band: for each kTileDepth of the depth the tiles of the first part, those of the second and of the third.
constexpr int64_t kPartPairs = 2 * kTilePairs, kStepPairs = kParts * kPartPairs;

// Measured on Emerald Rapids:
constexpr int64_t kSplitRows = 320;   // about, of a, beside a band of b in the second-level cache
constexpr int64_t kSplitDepth = 448;  // about

// An operand: element p along the depth of a line, a row of a or a column of b. One of the strides is 1.
struct Lines {
  const float* data;
  int64_t line_stride, depth_stride;

  Lines from(int64_t line, int64_t p) const {
    return {data + line * line_stride + p * depth_stride, line_stride, depth_stride};
  }
};

// The larger ones of two vectors of bfloat16 without their signs, which are doubled so.
TORCH_MLP_INLINE vec_uint larger(vec_uint doubled, vec_uint pairs) {
  const __m512i shifted = _mm512_add_epi16((__m512i)pairs, (__m512i)pairs);
  return (vec_uint)_mm512_maskz_max_epu16(0xffffffff, (__m512i)doubled, shifted);
}

// The first parts of the pairs (x, y), each to a tile of its own.
TORCH_MLP_INLINE vec_uint split_pairs(vec x, vec y, bfloat16_pair* to, vec_uint most) {
  const auto upper_half = [&](vec_uint bits) { return (vec)(bits & 0xffff0000); };
  const auto pairs = [&](vec first, vec second) { return (vec_uint)first >> 16 | (vec_uint)second; };
  // Rounded, ties away from 0. What is left may have either sign.
  const vec x0 = upper_half((vec_uint)x + 0x8000), y0 = upper_half((vec_uint)y + 0x8000);
  const vec_uint first = pairs(x0, y0);
  store(to, (vec)first);
  x -= x0;
  y -= y0;
  const vec x1 = upper_half((vec_uint)x), y1 = upper_half((vec_uint)y);
  store(to + kPartPairs, (vec)pairs(x1, y1));
  store(to + 2 * kPartPairs, (vec)pairs(x - x1, y - y1));
  return larger(most, first);
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
TORCH_MLP_INLINE vec_uint split_tile(const Lines& of, int64_t lines, int64_t depth, bfloat16_pair* to, vec_uint most) {
  constexpr bool rows_are_lines = is_a != is_transposed;  // as they lie in memory
  const int64_t stride = rows_are_lines ? of.line_stride : of.depth_stride, second_depth = depth - kTileSide;
  const int64_t rows = rows_are_lines ? lines : depth, cols = rows_are_lines ? depth : lines;
  const int64_t second_rows = rows_are_lines ? lines : second_depth, second_cols = rows_are_lines ? second_depth : lines;
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

// Splits (lines, depth) of an operand, with zeros up to whole bands and steps. Whether the parts can do for it.
template <bool is_a, bool is_transposed>
bool split(const Lines& of, int64_t lines, int64_t depth, bfloat16_pair* to) {
  vec_uint most{};
  for (int64_t band = 0; band < lines; band += kBand) {
    for (int64_t p = 0; p < depth; p += kTileDepth, to += kStepPairs) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t begin = band + half * kTileSide;
        const Lines tile = of.from(begin, p);
        bfloat16_pair* const to_tile = to + half * kTilePairs;
        if (lines - begin >= kTileSide && depth - p >= kTileDepth) {
          most = split_tile<is_a, is_transposed, true>(tile, kTileSide, kTileDepth, to_tile, most);
        } else {
          most = split_tile<is_a, is_transposed, false>(tile, lines - begin, depth - p, to_tile, most);
        }
      }
    }
  }
  uint16_t largest = 0, each[2 * kLanes];
  memcpy(each, &most, sizeof(each));
  for (const uint16_t value : each) {
    largest = value > largest ? value : largest;
  }
  constexpr uint16_t least = (127 - 48) << 8, too_large = (127 + 48) << 8;  // 2^-48 and 2^48 in bfloat16, doubled
  return largest == 0 || (largest >= least && largest < too_large);
}

// The shapes of the eight tiles, all of them whole.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// In memory throughout: the compiler does not know how much of it is read.
constexpr TileShapes kTileShapes;

// block (kBand, kBand) = the product of two bands, steps times kTileDepth deep.
__attribute__((noinline)) void multiply_bands(const bfloat16_pair* a, const bfloat16_pair* b, int64_t steps,
                                              float* block) {
  constexpr int64_t row_bytes = kTileSide * sizeof(float);
  // Tiles 0 to 3 hold the sums, 4 and 5 a part of a, 6 and 7 one of b.
  const auto load_a = [&](int part) {
    _tile_loadd(4, a + part * kPartPairs, row_bytes);
    _tile_loadd(5, a + part * kPartPairs + kTilePairs, row_bytes);
  };
  const auto load_b = [&](int part) {
    _tile_loadd(6, b + part * kPartPairs, row_bytes);
    _tile_loadd(7, b + part * kPartPairs + kTilePairs, row_bytes);
  };
  const auto multiply = [&] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  asm volatile("" ::: "memory");  // what was split is stored: the compiler does not know that loads of tiles read it
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step, a += kStepPairs, b += kStepPairs) {
    // The small products first; from one to the next, one operand stays.
    load_a(2);
    load_b(0);
    multiply();
    load_a(1);
    multiply();
    load_b(1);
    multiply();
    load_a(0);
    multiply();
    load_b(2);
    multiply();
    load_b(0);
    multiply();
  }
  constexpr int64_t block_bytes = kBand * sizeof(float);
  _tile_stored(0, block, block_bytes);
  _tile_stored(1, block + kTileSide, block_bytes);
  _tile_stored(2, block + kTileSide * kBand, block_bytes);
  _tile_stored(3, block + kTileSide * kBand + kTileSide, block_bytes);
}

// c = act(block + bias), or the same of c + block; c may be block.
template <ActivationKind kind, bool adds>
void finish_block(ConstMatrix block, const float* bias, int64_t rows, int64_t cols, Matrix c) {
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int64_t left = min(cols - j, kLanes);
    const vec of_bias = bias ? load_part(bias + j, left) : vec{};
    for (int64_t i = 0; i < rows; ++i) {
      float* to = c.data + i * c.stride + j;
      vec z = load_part(block.data + i * block.stride + j, left);
      if (adds) {
        z += load_part(to, left);
      }
      store_part(to, activation<kind>(bias ? z + of_bias : z), left);
    }
  }
}

// A part of a product: a (rows, depth), b (depth, cols).
struct SplitPart {
  int64_t rows, cols, depth;
  Lines a, b;
  Matrix c;
  bool adds;
  // At the end of the depth, else null and Identity:
  const float* bias;
  ActivationKind activation;
};

// By the tiles of gemm.h, which multiply floats.
void multiply_floats(const SplitPart& self, float* scratch) {
  const auto is_transposed = [](const Lines& of) { return of.line_stride == 1 && of.depth_stride != 1; };
  const bool copies_b = !is_transposed(self.b);
  const int64_t width = ceil_div(self.cols, kLanes) * kLanes;
  if (copies_b) {
    pack_transposed<float>({self.b.data, self.b.line_stride}, self.cols, self.depth, scratch);
  }
  const Product<float> exact{self.rows,
                             self.cols,
                             self.depth,
                             {self.a.data, is_transposed(self.a) ? self.a.depth_stride : self.a.line_stride},
                             is_transposed(self.a),
                             copies_b ? ConstMatrix{scratch, width} : ConstMatrix{self.b.data, self.b.depth_stride},
                             self.c,
                             self.adds};
  product(exact, 0, product_tasks(exact), scratch + self.depth * kBand);
  dispatch(self.activation, [&](auto act) {
    finish_block<act.value, false>(self.c, self.bias, self.rows, self.cols, self.c);
  });
}

// By the matrix unit, of operands that are split; b is one band.
void multiply_split(const SplitPart& self, const bfloat16_pair* a, const bfloat16_pair* b, float* block) {
  const int64_t steps = ceil_div(self.depth, kTileDepth);
  dispatch(self.activation, [&](auto act) {
    for (int64_t row = 0; row < self.rows; row += kBand, a += steps * kStepPairs) {
      multiply_bands(a, b, steps, block);
      (self.adds ? finish_block<act.value, true> : finish_block<act.value, false>)(
          {block, kBand}, self.bias, min(self.rows - row, kBand), self.cols,
          {self.c.data + row * self.c.stride, self.c.stride});
    }
  });
}

// What a thread cuts its part of a product into: whole bands and steps.
struct SplitBlocks {
  int64_t rows, depth;

  explicit SplitBlocks(const SplitProduct& of)
      : rows(ceil_div(equal_part(of.rows, kSplitRows), kBand) * kBand),
        depth(ceil_div(equal_part(of.depth, kSplitDepth), kTileDepth) * kTileDepth) {}

  int64_t band_pairs() const { return depth / kTileDepth * kStepPairs; }
  int64_t a_pairs() const { return rows / kBand * band_pairs(); }
};

bool is_split_by_rows(const SplitProduct& self) { return self.rows >= self.cols; }

int64_t split_product_tasks(const SplitProduct& self) { return ceil_div(max(self.rows, self.cols), kBand); }

// Two uses of the same memory: a band of b and a block of c, or what multiply_floats wants.
int64_t split_product_scratch(const SplitProduct& self) {
  const SplitBlocks blocks(self);
  const Product<float> exact{blocks.rows, kBand, blocks.depth, self.a, self.a_transposed, self.b, self.c};
  return blocks.a_pairs() +
         max(blocks.band_pairs() + kBand * kBand, blocks.depth * kBand + product_scratch(exact));
}

void split_product(const SplitProduct& self, int64_t begin, int64_t end, bfloat16_pair* scratch) {
  const bool by_rows = is_split_by_rows(self);
  const int64_t first_row = by_rows ? begin * kBand : 0, last_row = by_rows ? min(self.rows, end * kBand) : self.rows;
  const int64_t first_col = by_rows ? 0 : begin * kBand, last_col = by_rows ? self.cols : min(self.cols, end * kBand);
  const auto lines = [](ConstMatrix of, bool by_columns) {
    return by_columns ? Lines{of.data, 1, of.stride} : Lines{of.data, of.stride, 1};
  };
  const Lines all_a = lines(self.a, self.a_transposed), all_b = lines(self.b, !self.b_transposed);
  const SplitBlocks blocks(self);
  bfloat16_pair *const of_a = scratch, *const of_b = of_a + blocks.a_pairs();
  float *const block = reinterpret_cast<float*>(of_b + blocks.band_pairs());
  _tile_loadconfig(&kTileShapes);
  for (int64_t row = first_row; row < last_row; row += blocks.rows) {
    for (int64_t p = 0; p < self.depth; p += blocks.depth) {
      SplitPart part{};
      part.rows = min(last_row - row, blocks.rows);
      part.depth = min(self.depth - p, blocks.depth);
      part.a = all_a.from(row, p);
      part.adds = self.accumulates || p > 0;
      const bool is_last = p + part.depth == self.depth;
      part.activation = is_last ? self.activation : ActivationKind::Identity;
      const bool splits_a = (self.a_transposed ? split<true, true> : split<true, false>)(part.a, part.rows, part.depth, of_a);
      for (int64_t col = first_col; col < last_col; col += kBand) {
        part.cols = min(last_col - col, kBand);
        part.b = all_b.from(col, p);
        part.c = {self.c.data + row * self.c.stride + col, self.c.stride};
        part.bias = is_last && self.bias ? self.bias + col : nullptr;
        if (splits_a && (self.b_transposed ? split<false, true> : split<false, false>)(part.b, part.cols, part.depth, of_b)) {
          multiply_split(part, of_a, of_b, block);
        } else {
          multiply_floats(part, reinterpret_cast<float*>(of_b));
        }
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

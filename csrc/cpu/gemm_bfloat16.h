// Products of bfloat16 into bfloat16, as the gradients of a linear layer need them, by the tiles of gemm.h.
//
// A task is a block of c. Both operands are copied, a part of the depth at a time, into pairs along it: a for all
// columns of the block, b panel by panel, each of which fits the first-level cache. The sums are float, in registers
// and between the parts in scratch memory, and are rounded once. Block and copies stay in the second-level cache. For
// level.h.
#pragma once

#include "gemm.h"
#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// Of c: tall, for that often is a panel of b used, and wide enough for copies of a to be cheap.
constexpr int64_t kBfloat16BlockRows = 256;  // about
constexpr int64_t kBfloat16BlockCols = 2 * kTileCols;

// --- operands in pairs ---

// Floats as pairs of bfloat16.
TORCH_MLP_INLINE vec pairs_of(vec first, vec second) {
  return (vec)(round_to_bfloat16(first) >> 16 | (round_to_bfloat16(second) & 0xffff0000));
}

// The pairs of columns of x, for the odd last one with a zero.
template <size_t... lane>
TORCH_MLP_INLINE vec pairs_in_order(vec left, vec right, std::index_sequence<lane...>) {
  return pairs_of(TORCH_MLP_SHUFFLE(left, right, int(2 * lane)...),
                  TORCH_MLP_SHUFFLE(left, right, int(2 * lane + 1)...));
}

void pair_columns(ConstMatrix x, int64_t rows, int64_t cols, Rows<bfloat16_pair> pairs) {
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = x.data + i * x.stride;
    bfloat16_pair* to = pairs.data + i * pairs.stride;
    int64_t j = 0;
    for (; j + 2 * kLanes <= cols; j += 2 * kLanes) {
      store(to + j / 2, pairs_in_order(load(from + j), load(from + j + kLanes), lanes));
    }
    if (const int64_t left = cols - j; left > 0) {
      const vec first = load_part(from + j, min(left, kLanes));
      const vec second = left > kLanes ? load_part(from + j + kLanes, left - kLanes) : vec{};
      store_part(to + j / 2, pairs_in_order(first, second, lanes), ceil_div(left, 2));
    }
  }
}

// The pairs of rows of x, for the odd last one with zeros.
void pair_rows(ConstMatrix x, int64_t rows, int64_t cols, Rows<bfloat16_pair> pairs) {
  const int64_t whole = whole_vectors(cols), rest = cols - whole;
  for (int64_t i = 0; i < rows; i += 2) {
    const float* from = x.data + i * x.stride;
    bfloat16_pair* to = pairs.data + i / 2 * pairs.stride;
    const bool is_pair = i + 1 < rows;
    for (int64_t j = 0; j < whole; j += kLanes) {
      store(to + j, pairs_of(load(from + j), is_pair ? load(from + x.stride + j) : vec{}));
    }
    if (rest) {
      const vec second = is_pair ? load_part(from + x.stride + whole, rest) : vec{};
      store_part(to + whole, pairs_of(load_part(from + whole, rest), second), rest);
    }
  }
}

// (ceil(rows / 2), cols) pairs of the rows of x, with zeros for the partner of an odd last one and up to whole vectors.
void interleave_rows(Rows<const bfloat16_bits> x, int64_t rows, int64_t cols, Rows<bfloat16_pair> pairs) {
  const int64_t whole = whole_vectors(cols), left = cols - whole;
  for (int64_t i = 0; i < rows; i += 2) {
    const bfloat16_bits *first = x.data + i * x.stride, *second = first + x.stride;
    const bool is_pair = i + 1 < rows;
    bfloat16_pair* to = pairs.data + i / 2 * pairs.stride;
    for (int64_t j = 0; j < whole; j += kLanes) {
      store(to + j, exact_pairs_of(load(first + j), is_pair ? load(second + j) : vec{}));
    }
    if (left) {
      store(to + whole,
            exact_pairs_of(load_part(first + whole, left), is_pair ? load_part(second + whole, left) : vec{}));
    }
  }
}

// (rows, ceil(cols / 2)) pairs of the columns of x, with a zero for the partner of an odd last one.
void copy_columns(Rows<const bfloat16_bits> x, int64_t rows, int64_t cols, Rows<bfloat16_pair> pairs) {
  for (int64_t i = 0; i < rows; ++i) {
    bfloat16_pair* to = pairs.data + i * pairs.stride;
    to[cols / 2] = {};
    memcpy(to, x.data + i * x.stride, cols * sizeof(bfloat16_bits));
  }
}

// What a product's tasks are cut into; depth in pairs.
struct Bfloat16Blocks {
  int64_t rows, depth, a_stride;

  explicit Bfloat16Blocks(const Bfloat16Product& of)
      : rows(equal_part(of.rows, kBfloat16BlockRows)),
        depth(equal_part(ceil_div(of.depth, 2), tuning().depth)),
        // An odd number of cache lines, so that a column does not fall into a few sets of a cache.
        a_stride((ceil_div((of.a_transposed ? rows : depth + 1), 16) | 1) * 16) {}

  int64_t a_elements(const Bfloat16Product& of) const { return (of.a_transposed ? depth : rows) * a_stride; }
  int64_t b_elements() const { return depth * kTileCols; }
};

// Where a tile's sums come from and go to.
struct Bfloat16Sums {
  Matrix partial;
  bool is_first, is_last;  // part of the depth
  Rows<bfloat16_bits> c;
  int64_t cols;

  Bfloat16Sums from_row(int64_t i) const {
    return {{partial.data + i * partial.stride, partial.stride},
            is_first,
            is_last,
            {c.data + i * c.stride, c.stride},
            cols};
  }
};

// c = sum, of whose last vector the first `last` lanes count: rounded to nearest, ties to even, in one instruction,
// which takes subnormal numbers for 0, as the one that multiplies does.
template <int rows, int vectors>
TORCH_MLP_INLINE void round_sums(const vec (&sum)[rows][vectors], Rows<bfloat16_bits> c, int64_t last) {
  TORCH_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      const __mmask16 lanes = (1u << (j + 1 < vectors ? kLanes : last)) - 1;
      _mm256_mask_storeu_epi16(c.data + i * c.stride + j * kLanes, lanes,
                               (__m256i)_mm512_cvtneps_pbh((__m512)sum[i][j]));
    }
  }
}

template <int rows, int vectors, bool has_columns>
TORCH_MLP_INLINE void bfloat16_tile(int64_t depth, Broadcast<bfloat16_pair> a, const bfloat16_pair* b,
                                    const Bfloat16Sums& sums) {
  vec sum[rows][vectors] = {};
  if (!sums.is_first) {
    TORCH_MLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      TORCH_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        sum[i][j] = load(sums.partial.data + i * sums.partial.stride + j * kLanes);
      }
    }
  }
  add_products<has_columns>(depth, a, Rows<const bfloat16_pair>{b, vectors * kLanes}, sum);
  if (sums.is_last) {
    round_sums(sum, sums.c, sums.cols - (vectors - 1) * kLanes);
  } else {
    add_or_store<false>(sum, sums.partial, kLanes);
  }
}

template <int vectors, bool has_columns, int most_rows = kTileRows - 1>
__attribute__((noinline)) void short_bfloat16_tile(int64_t rows, int64_t depth, Broadcast<bfloat16_pair> a,
                                                   const bfloat16_pair* b, const Bfloat16Sums& sums) {
  if (rows == most_rows) {
    bfloat16_tile<most_rows, vectors, has_columns>(depth, a, b, sums);
  } else if constexpr (most_rows > 1) {
    short_bfloat16_tile<vectors, has_columns, most_rows - 1>(rows, depth, a, b, sums);
  }
}

// The tiles of one panel, one below the other.
template <bool has_columns, int vectors = kTileVectors>
void bfloat16_tiles(int64_t rows, int64_t depth, Broadcast<bfloat16_pair> a, const bfloat16_pair* b,
                    const Bfloat16Sums& sums) {
  if constexpr (vectors > 1) {
    if (sums.cols <= (vectors - 1) * kLanes) {
      return bfloat16_tiles<has_columns, vectors - 1>(rows, depth, a, b, sums);
    }
  }
  for_each_tile(
      rows,
      [&](int64_t begin) {
        bfloat16_tile<kTileRows, vectors, has_columns>(depth, a.rows(begin, begin + kTileRows), b,
                                                       sums.from_row(begin));
      },
      [&](int64_t begin, int64_t end) {
        short_bfloat16_tile<vectors, has_columns>(end - begin, depth, a.rows(begin, end), b, sums.from_row(begin));
      });
}

int64_t bfloat16_product_tasks(const Bfloat16Product& self) {
  return ceil_div(self.rows, Bfloat16Blocks(self).rows) * ceil_div(self.cols, kBfloat16BlockCols);
}

int64_t bfloat16_product_scratch(const Bfloat16Product& self) {
  const Bfloat16Blocks blocks(self);
  return 2 * (blocks.a_elements(self) + blocks.b_elements() + blocks.rows * kBfloat16BlockCols);
}

void bfloat16_product(const Bfloat16Product& self, int64_t begin, int64_t end, bfloat16_bits* scratch) {
  const Bfloat16Blocks blocks(self);
  bfloat16_pair *of_a = reinterpret_cast<bfloat16_pair*>(scratch), *of_b = of_a + blocks.a_elements(self);
  const Matrix partial{reinterpret_cast<float*>(of_b + blocks.b_elements()), kBfloat16BlockCols};
  const int64_t row_blocks = ceil_div(self.rows, blocks.rows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task % row_blocks * blocks.rows, col = task / row_blocks * kBfloat16BlockCols;
    const int64_t rows = min(self.rows - row, blocks.rows), cols = min(self.cols - col, kBfloat16BlockCols);
    for (int64_t p = 0; p < self.depth; p += 2 * blocks.depth) {
      const int64_t depth = min(self.depth - p, 2 * blocks.depth), pairs = ceil_div(depth, 2);
      const Rows<bfloat16_pair> a{of_a, blocks.a_stride};
      if (self.a_transposed) {
        interleave_rows({self.a.data + p * self.a.stride + row, self.a.stride}, depth, rows, a);
      } else {
        copy_columns({self.a.data + row * self.a.stride + p, self.a.stride}, rows, depth, a);
      }
      for (int64_t j = 0; j < cols; j += kTileCols) {
        const int64_t width = min(cols - j, kTileCols), whole = ceil_div(width, kLanes) * kLanes;
        interleave_rows({self.b.data + p * self.b.stride + col + j, self.b.stride}, depth, width, {of_b, whole});
        const Bfloat16Sums sums{{partial.data + j, partial.stride},
                                p == 0,
                                p + depth == self.depth,
                                {self.c.data + row * self.c.stride + col + j, self.c.stride},
                                width};
        if (self.a_transposed) {
          bfloat16_tiles<true>(rows, pairs, {a.data, 1, a.stride}, of_b, sums);
        } else {
          bfloat16_tiles<false>(rows, pairs, {a.data, a.stride, 1}, of_b, sums);
        }
      }
    }
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

// A tile of a matrix product, c (+)= a b, in registers: vectors along a row of b and c, and one element of a broadcast
// to all lanes. For gemm.h.
#pragma once

#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// The accumulators, a row of b and one element of a fill the registers: 24 + 4 + 1 of 32, or 12 + 2 + 1 of 16.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
constexpr int kTileCols = kTileVectors * kLanes;

// total cut into equal parts of about that size.
TORCH_MLP_INLINE int64_t equal_part(int64_t total, int64_t size) {
  return ceil_div(total, max(1, (total + size / 2) / size));
}

// Operand a of a tile: element (i, p) lies at data[i * row_stride + p * depth_stride].
template <typename T>
struct Broadcast {
  const T* data;
  int64_t row_stride, depth_stride;

  TORCH_MLP_INLINE Broadcast rows(int64_t begin, [[maybe_unused]] int64_t end) const {
    return {data + begin * row_stride, row_stride, depth_stride};
  }
};

// The same, packed by pack_tiles.
template <typename T>
struct PackedTiles {
  const T* data;
  int64_t depth;

  TORCH_MLP_INLINE Broadcast<T> rows(int64_t begin, int64_t end) const {
    return {data + begin * depth, 1, end - begin};
  }
};

// c = sum, or c += sum, of whose last vector the first `last` lanes count.
template <bool adds, int rows, int vectors>
TORCH_MLP_INLINE void add_or_store(const vec (&sum)[rows][vectors], Matrix c, int64_t last) {
  TORCH_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    float* row = c.data + i * c.stride;
    TORCH_MLP_UNROLL
    for (int j = 0; j + 1 < vectors; ++j) {
      store(row + j * kLanes, adds ? load(row + j * kLanes) + sum[i][j] : sum[i][j]);
    }
    float* end = row + (vectors - 1) * kLanes;
    const vec end_sum = sum[i][vectors - 1];
    if (last == kLanes) {
      store(end, adds ? load(end) + end_sum : end_sum);
    } else {
      store_part(end, adds ? load_part(end, last) + end_sum : end_sum, last);
    }
  }
}

// sum += a b; has_columns says that the row stride of a is 1.
template <bool has_columns, int rows, int vectors, typename T>
TORCH_MLP_INLINE void add_products(int64_t depth, Broadcast<T> a, Rows<const T> b, vec (&sum)[rows][vectors]) {
  // Addresses have a base, and once or twice an index: with two bases there are enough registers for all rows.
  constexpr int half = rows / 2;
  const int64_t row_stride = has_columns ? 1 : a.row_stride;
  const T *upper = a.data, *lower = upper + half * row_stride;
  for (int64_t p = 0; p < depth; ++p, upper += a.depth_stride, lower += a.depth_stride, b.data += b.stride) {
    vec b_row[vectors];
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      b_row[j] = load(b.data + j * kLanes);
    }
    TORCH_MLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      const vec element = broadcast(i < half ? upper[i * row_stride] : lower[(i - half) * row_stride]);
      TORCH_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        sum[i][j] = multiply_add<T>(element, b_row[j], sum[i][j]);
      }
    }
  }
}

// c (rows, cols) = a b, or c += a b, with cols in the last of `vectors` vectors; b can be read in whole vectors.
// has_columns says that the row stride of a is 1.
template <int rows, int vectors, bool has_columns, typename T>
TORCH_MLP_INLINE void tile(int64_t depth, Broadcast<T> a, Rows<const T> b, Matrix c, int64_t cols, bool accumulates) {
  // Where the sums will go is fetched meanwhile: with a short depth, waiting for it would take as long as the work.
  TORCH_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      __builtin_prefetch(c.data + i * c.stride + j * kLanes, 1);
    }
  }
  vec sum[rows][vectors] = {};
  add_products<has_columns>(depth, a, b, sum);
  if (accumulates) {
    add_or_store<true>(sum, c, cols - (vectors - 1) * kLanes);
  } else {
    add_or_store<false>(sum, c, cols - (vectors - 1) * kLanes);
  }
}

// A tile of fewer rows.
template <int vectors, bool has_columns, int most_rows = kTileRows - 1, typename T>
__attribute__((noinline)) void short_tile(int64_t rows, int64_t depth, Broadcast<T> a, Rows<const T> b, Matrix c,
                                          int64_t cols, bool accumulates) {
  if (rows == most_rows) {
    tile<most_rows, vectors, has_columns>(depth, a, b, c, cols, accumulates);
  } else if constexpr (most_rows > 1) {
    short_tile<vectors, has_columns, most_rows - 1>(rows, depth, a, b, c, cols, accumulates);
  }
}

// What is needed next: (rows, cols), adjacent rows too far apart for the processor to fetch it by itself.
template <typename T>
struct Ahead {
  Rows<const T> matrix;
  int64_t rows, cols;
};

template <typename T>
TORCH_MLP_INLINE void fetch(const Ahead<T>& ahead, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j < ahead.cols; j += 16) {
      __builtin_prefetch(ahead.matrix.data + i * ahead.matrix.stride + j);
    }
  }
}

// Calls whole(begin) for tiles of kTileRows rows, and part(begin, end) for what is left: a tile, or two of half the
// rows.
template <typename Whole, typename Part>
TORCH_MLP_INLINE void for_each_tile(int64_t rows, const Whole& whole, const Part& part) {
  int64_t begin = 0;
  for (; rows - begin == kTileRows || rows - begin > 2 * (kTileRows - 1); begin += kTileRows) {
    whole(begin);
  }
  const int64_t left = rows - begin, half = left > kTileRows ? begin + left / 2 : begin;
  if (half > begin) {
    part(begin, half);
  }
  if (rows > half) {
    part(half, rows);
  }
}

// The tiles of one panel of at most kTileCols columns, one below the other. Meanwhile the next panel is fetched: its
// rows lie too far apart for the processor to do so by itself.
template <bool has_columns, typename T, int vectors = kTileVectors, typename A>
void tiles(int64_t rows, int64_t depth, const A& a, Rows<const T> b, Matrix c, int64_t cols, bool accumulates,
           Ahead<T> ahead) {
  if constexpr (vectors > 1) {
    if (cols <= (vectors - 1) * kLanes) {
      return tiles<has_columns, T, vectors - 1>(rows, depth, a, b, c, cols, accumulates, ahead);
    }
  }
  const auto fetch_part = [&](int64_t begin, int64_t end) {
    if (ahead.rows > 0) {
      fetch(ahead, ahead.rows * begin / rows, ahead.rows * end / rows);
    }
  };
  // Most tiles are computed here and not in a function, whose arguments would pass through memory: where they lie on
  // a page as the sums do that are being written, the processor would wait for those.
  for_each_tile(
      rows,
      [&](int64_t begin) {
        fetch_part(begin, begin + kTileRows);
        tile<kTileRows, vectors, has_columns>(depth, a.rows(begin, begin + kTileRows), b,
                                              {c.data + begin * c.stride, c.stride}, cols, accumulates);
      },
      [&](int64_t begin, int64_t end) {
        fetch_part(begin, end);
        short_tile<vectors, has_columns>(end - begin, depth, a.rows(begin, end), b,
                                         {c.data + begin * c.stride, c.stride}, cols, accumulates);
      });
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

// Matrix products of the sizes that multilayer perceptrons have, a tile of the result in registers at a time.
//
// One tile serves all three products of a linear layer, c (+)= a b with the vectors along a row of b and c and one
// element of a broadcast to all lanes; a may be read along its rows or down its columns:
//
//   product   grad_input = gz W             b = W, as it lies in memory
//   product   grad_weight = gz^T x          b = x, as it lies in memory, and a = gz down its columns
//   linear    y^T = W x^T                   b = x^T: a panel of kTileCols rows of x, transposed, for all rows of W; a
//                                           block of y^T gets bias and activation, and is transposed back, while it is
//                                           in the first-level cache
//             y = x W^T                     b = W^T, where W has fewer rows than x: the same without transposing back
//
// While the tiles of one panel of b are computed, the next is fetched: then it need not be packed, but for panels that
// are narrow or end within a vector. A few rows of x, or a few outputs, go by dot products along in_features instead
// (dots.h).
//
// All of it is there for float and for bfloat16_pair, whose matrices hold two bfloat16 along the depth in an element,
// so that the depth is half as long, and which are summed in float.
//
// The tiles' sums over a long depth are cut at about kTileDepth, for cache and for accuracy. Every element is summed in
// the same order whichever thread computes it. For level.h.
#pragma once

#include "dots.h"
#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// The accumulators, a row of b and one element of a fill the registers: 24 + 4 + 1 of 32, or 12 + 2 + 1 of 16.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
constexpr int kTileCols = kTileVectors * kLanes;
constexpr int64_t kTileDepth = 256;  // about
// A row of a narrow panel is one line of the cache, or half of one, far from the next: such panels are copied.
constexpr bool kPacksAllPanels = kTileCols * sizeof(float) < 256;
// Measured on AMD Zen 4, in rows but for the last:
constexpr int64_t kFinishRows = 48;         // between the tiles and the activation
constexpr int64_t kBlockRows = 256;         // about, of a, beside a panel of b in the second-level cache
constexpr int64_t kMinFetchRows = 48;       // of a, during which the next panel is worth fetching
constexpr int64_t kMinSplitRows = 48;       // worth dividing among threads
constexpr int64_t kMostPanelOutputs = 512;  // of W, which may be packed rather than those of x
constexpr int64_t kCachedFloats = 1 << 16;  // of b, which stay in cache: a quarter of a megabyte

// total cut into equal parts of about that size.
TORCH_MLP_INLINE int64_t equal_part(int64_t total, int64_t size) {
  return ceil_div(total, max(1, (total + size / 2) / size));
}

// Operand a of a tile: element (i, p) lies at data[i * row_stride + p * depth_stride].
template <typename T>
struct Broadcast {
  const T* data;
  int64_t row_stride, depth_stride;
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

// c (rows, cols) = a b, or c += a b, with cols in the last of `vectors` vectors; b can be read in whole vectors.
template <int rows, int vectors, typename T>
__attribute__((noinline)) void tile(int64_t depth, Broadcast<T> a, Rows<const T> b, Matrix c, int64_t cols,
                                    bool accumulates) {
  // Where the sums will go is fetched meanwhile: with a short depth, waiting for it would take as long as the work.
  TORCH_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      __builtin_prefetch(c.data + i * c.stride + j * kLanes, 1);
    }
  }
  vec sum[rows][vectors] = {};
  for (int64_t p = 0; p < depth; ++p, a.data += a.depth_stride, b.data += b.stride) {
    vec b_row[vectors];
    TORCH_MLP_UNROLL
    for (int j = 0; j < vectors; ++j) {
      b_row[j] = load(b.data + j * kLanes);
    }
    TORCH_MLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      const vec element = broadcast(a.data[i * a.row_stride]);
      TORCH_MLP_UNROLL
      for (int j = 0; j < vectors; ++j) {
        sum[i][j] = multiply_add<T>(element, b_row[j], sum[i][j]);
      }
    }
  }
  if (accumulates) {
    add_or_store<true>(sum, c, cols - (vectors - 1) * kLanes);
  } else {
    add_or_store<false>(sum, c, cols - (vectors - 1) * kLanes);
  }
}

template <int most_rows, int vectors, typename T>
TORCH_MLP_INLINE void tile_of(int64_t rows, int64_t depth, Broadcast<T> a, Rows<const T> b, Matrix c, int64_t cols,
                              bool accumulates) {
  if (rows == most_rows) {
    tile<most_rows, vectors>(depth, a, b, c, cols, accumulates);
  } else if constexpr (most_rows > 1) {
    tile_of<most_rows - 1, vectors>(rows, depth, a, b, c, cols, accumulates);
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

// The tiles of one panel of at most kTileCols columns, one below the other and of about the same height. Meanwhile the
// next panel is fetched: its rows lie too far apart for the processor to do so by itself.
template <typename T, int vectors = kTileVectors>
void tiles(int64_t rows, int64_t depth, Broadcast<T> a, Rows<const T> b, Matrix c, int64_t cols, bool accumulates,
           Ahead<T> ahead) {
  if constexpr (vectors > 1) {
    if (cols <= (vectors - 1) * kLanes) {
      return tiles<T, vectors - 1>(rows, depth, a, b, c, cols, accumulates, ahead);
    }
  }
  const int64_t count = ceil_div(rows, kTileRows);
  for (int64_t t = 0, begin = 0; t < count; ++t) {
    const int64_t end = rows * (t + 1) / count;
    fetch(ahead, ahead.rows * t / count, ahead.rows * (t + 1) / count);
    tile_of<kTileRows, vectors, T>(end - begin, depth, {a.data + begin * a.row_stride, a.row_stride, a.depth_stride}, b,
                                   {c.data + begin * c.stride, c.stride}, cols, accumulates);
    begin = end;
  }
}

// --- product: c = a b or a^T b. A task is a row of tiles, or a panel of columns where there are few rows. ---

template <typename T>
bool is_split_by_rows(const Product<T>& self) {
  return self.rows >= kMinSplitRows;
}

template <typename T>
int64_t product_tasks(const Product<T>& self) {
  return is_split_by_rows(self) ? ceil_div(self.rows, kTileRows) : ceil_div(self.cols, kTileCols);
}

template <typename T>
int64_t product_scratch(const Product<T>& self) {
  return equal_part(self.depth, kTileDepth) * kTileCols;
}

// (depth, cols) of b with the rows filled up with zeros to whole vectors.
template <typename T>
Rows<const T> pack(Rows<const T> b, int64_t depth, int64_t cols, T* panel) {
  const int64_t whole = whole_vectors(cols), width = ceil_div(cols, kLanes) * kLanes;
  for (int64_t p = 0; p < depth; ++p) {
    const T* from = b.data + p * b.stride;
    T* to = panel + p * width;
    for (int64_t j = 0; j < whole; j += kLanes) {
      store(to + j, load(from + j));
    }
    if (whole < cols) {
      store(to + whole, load_part(from + whole, cols - whole));
    }
  }
  return {panel, width};
}

// c = a b, or c += a b, of a column and a row: nothing but writing, which goes best along whole rows.
template <bool adds>
void outer_product(Broadcast<float> a, const float* b, Matrix c, int64_t rows, int64_t cols) {
  const int64_t whole = whole_vectors(cols), left = cols - whole;
  for (int64_t i = 0; i < rows; ++i) {
    const float element = a.data[i * a.row_stride];
    float* row = c.data + i * c.stride;
    for (int64_t j = 0; j < whole; j += kLanes) {
      store(row + j, adds ? load(row + j) + element * load(b + j) : element * load(b + j));
    }
    if (left) {
      const vec value = element * load_part(b + whole, left);
      store_part(row + whole, adds ? load_part(row + whole, left) + value : value, left);
    }
  }
}

template <typename T>
void product(const Product<T>& self, int64_t begin, int64_t end, T* scratch) {
  const bool by_rows = is_split_by_rows(self);
  const int64_t first_row = by_rows ? begin * kTileRows : 0, first_col = by_rows ? 0 : begin * kTileCols;
  const int64_t last_row = by_rows ? min(self.rows, end * kTileRows) : self.rows;
  const int64_t last_col = by_rows ? self.cols : min(self.cols, end * kTileCols);
  // Where all of b stays in cache as it is, c is written row by row; else a part of a does, beside a panel of b.
  const int64_t b_cols = last_col - first_col;
  const bool keeps_b = !kPacksAllPanels && b_cols % kLanes == 0 && self.depth * b_cols <= kCachedFloats;
  const int64_t most_rows = keeps_b ? kTileRows : equal_part(last_row - first_row, kBlockRows);
  const int64_t most_depth = equal_part(self.depth, kTileDepth);
  for (int64_t row = first_row; row < last_row; row += most_rows) {
    const int64_t rows = min(last_row - row, most_rows);
    const auto a = self.a_transposed ? Broadcast<T>{self.a.data + row, 1, self.a.stride}
                                     : Broadcast<T>{self.a.data + row * self.a.stride, self.a.stride, 1};
    if constexpr (std::is_same_v<T, float>) {
      if (self.depth == 1) {
        const Matrix c{self.c.data + row * self.c.stride + first_col, self.c.stride};
        (self.accumulates ? outer_product<true> : outer_product<false>)(a, self.b.data + first_col, c, rows, b_cols);
        continue;
      }
    }
    for (int64_t p = 0; p < self.depth; p += most_depth) {
      const int64_t depth = min(self.depth - p, most_depth);
      const T* of_b = self.b.data + p * self.b.stride;
      for (int64_t col = first_col; col < last_col; col += kTileCols) {
        const int64_t cols = min(last_col - col, kTileCols), next = col + kTileCols;
        const bool packs = kPacksAllPanels || cols % kLanes;
        const Rows<const T> b{of_b + col, self.b.stride};
        const bool fetches = !keeps_b && rows >= kMinFetchRows && (next < last_col || p + depth < self.depth);
        const Ahead<T> ahead{{next < last_col ? of_b + next : of_b + depth * self.b.stride + first_col, self.b.stride},
                             fetches ? depth : 0,
                             kTileCols};
        tiles<T>(rows, depth, {a.data + p * a.depth_stride, a.row_stride, a.depth_stride},
                 packs ? pack(b, depth, cols, scratch) : b, {self.c.data + row * self.c.stride + col, self.c.stride},
                 cols, p > 0 || self.accumulates, ahead);
      }
    }
  }
}

// --- linear by panels. A task is kLanes rows of the other operand with a panel of kTileCols rows of the first. ---

// (depth, rows) = the transpose of x (rows, depth), the rows filled up with zeros to whole vectors.
template <typename T>
void pack_transposed(Rows<const T> x, int64_t rows, int64_t depth, T* panel) {
  const int64_t width = ceil_div(rows, kLanes) * kLanes;
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t p = 0; p < depth; p += kLanes) {
      const T* from = x.data + i * x.stride + p;
      T* to = panel + p * width + i;
      const int64_t left = depth - p;
      vec square[kLanes];
      if (left >= kLanes && rows - i >= kLanes) {
        TORCH_MLP_UNROLL
        for (int l = 0; l < kLanes; ++l) {
          square[l] = load(from + l * x.stride);
        }
      } else {
        TORCH_MLP_UNROLL
        for (int l = 0; l < kLanes; ++l) {
          square[l] = i + l < rows ? load_part(from + l * x.stride, min(left, kLanes)) : vec{};
        }
      }
      transpose(square);
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        if (l < left) {
          store(to + l * width, square[l]);
        }
      }
    }
  }
}

// The part of y that a block holds, from there on with bias and activation.
template <ActivationKind kind, typename Out>
void finish_rows(Matrix block, const float* bias, int64_t rows, int64_t outputs, Rows<Out> y) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < outputs; n += kLanes) {
      const int64_t left = min(outputs - n, kLanes);
      const vec z = load(block.data + i * block.stride + n);
      const vec value = activation<kind>(bias ? z + load_part(bias + n, left) : z);
      Out* to = y.data + i * y.stride + n;
      left == kLanes ? store(to, value) : store_part(to, value, left);
    }
  }
}

// The same of a block of y^T.
template <ActivationKind kind, typename Out>
void finish_transposed(Matrix block, const float* bias, int64_t outputs, int64_t rows, Rows<Out> y) {
  for (int64_t n = 0; n < outputs; n += kLanes) {
    const int64_t left = min(outputs - n, kLanes);
    for (int64_t i = 0; i < rows; i += kLanes) {
      vec square[kLanes];
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        const vec z = load(block.data + (n + l) * block.stride + i);
        square[l] = activation<kind>(bias && l < left ? z + bias[n + l] : z);
      }
      transpose(square);
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        if (i + l < rows) {
          Out* to = y.data + (i + l) * y.stride + n;
          left == kLanes ? store(to, square[l]) : store_part(to, square[l], left);
        }
      }
    }
  }
}

// Whether x lies in the panels and a block is one of y^T; else W does, and it is one of y. The one of fewer rows is the
// cheaper to pack, but y is then written panel by panel.
bool puts_x_in_panels(const LinearShape& shape) {
  return shape.batch <= shape.out_features || shape.out_features > kMostPanelOutputs;
}

int64_t panel_elements(const LinearShape& shape) { return shape.in_features * kTileCols; }

template <typename T, typename Out>
void linear_by_panels(const LinearForward<T, Out>& self, int64_t begin, int64_t end, T* scratch) {
  const LinearShape& shape = self.shape;
  const bool is_transposed = puts_x_in_panels(shape);
  const Rows<const T>& first = is_transposed ? self.input : self.weight;
  const Rows<const T>& other = is_transposed ? self.weight : self.input;
  const int64_t first_rows = is_transposed ? shape.batch : shape.out_features;
  const int64_t other_rows = is_transposed ? shape.out_features : shape.batch;
  const int64_t tasks = ceil_div(other_rows, kLanes);  // of one panel
  const int64_t depth = shape.in_features, most_depth = equal_part(depth, kTileDepth);
  while (begin < end) {
    const int64_t panel = begin / tasks, next = min(end, (panel + 1) * tasks), row = panel * kTileCols;
    const int64_t rows = min(first_rows - row, kTileCols), width = ceil_div(rows, kLanes) * kLanes;
    const int64_t last = min(other_rows, (next - panel * tasks) * kLanes);
    pack_transposed<T>({first.data + row * first.stride, first.stride}, rows, depth, scratch);
    for (int64_t n = begin % tasks * kLanes; n < last; n += kFinishRows) {
      const int64_t count = min(last - n, kFinishRows), y_row = is_transposed ? row : n,
                    y_col = is_transposed ? n : row;
      const Rows<Out> y{self.output.data + y_row * self.output.stride + y_col, self.output.stride};
      const Matrix block{reinterpret_cast<float*>(scratch + panel_elements(shape)), width};
      for (int64_t p = 0; p < depth; p += most_depth) {
        tiles<T>(count, min(depth - p, most_depth), {other.data + n * other.stride + p, other.stride, 1},
                 {scratch + p * width, width}, block, width, p > 0, {});
      }
      const float* bias = self.bias ? self.bias + y_col : nullptr;
      dispatch(self.activation, [&](auto act) {
        is_transposed ? finish_transposed<act.value>(block, bias, count, rows, y)
                      : finish_rows<act.value>(block, bias, count, rows, y);
      });
    }
    begin = next;
  }
}

// --- linear: the better of the two ---

// With fewer rows, or fewer outputs, the panel costs more than it saves.
template <typename T>
bool by_dots(const LinearShape& shape) {
  return std::is_same_v<T, float> && (shape.batch < 16 || shape.out_features <= 16);
}

template <typename T>
int64_t linear_tasks(const LinearShape& shape) {
  if (by_dots<T>(shape)) {
    return dot_tasks(shape);
  }
  return puts_x_in_panels(shape) ? ceil_div(shape.batch, kTileCols) * ceil_div(shape.out_features, kLanes)
                                 : ceil_div(shape.out_features, kTileCols) * ceil_div(shape.batch, kLanes);
}

template <typename T>
int64_t linear_scratch(const LinearShape& shape) {
  return by_dots<T>(shape) ? 0 : panel_elements(shape) + kFinishRows * kTileCols;
}

template <typename T, typename Out>
void linear(const LinearForward<T, Out>& self, int64_t begin, int64_t end, T* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    if (by_dots<T>(self.shape)) {
      return linear_by_dots(self, begin, end);
    }
  }
  linear_by_panels(self, begin, end, scratch);
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

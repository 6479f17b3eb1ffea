// Matrix products of the sizes that multilayer perceptrons have, a tile of the result in registers at a time (tiles.h).
//
// One tile serves all three products of a linear layer, c (+)= a b; a may be read along its rows or down its columns:
//
//   product   grad_input = gz W             b = W, as it lies in memory
//   product   grad_weight = gz^T x          b = x, as it lies in memory, and a = gz down its columns
//   linear    y^T = W x^T                   b = x^T: a panel of kPanelCols rows of x, transposed, for all rows of W; a
//                                           block of y^T gets bias and activation, and is transposed back, while it is
//                                           in the first-level cache
//             y = x W^T                     b = W^T, where W has fewer rows than x: the same without transposing back
//
// While the tiles of one panel of b are computed, the next is fetched: then it need not be packed, but for what packs_b
// says and where it ends within a vector. A few rows of x, or a few outputs, go by dot products along in_features
// instead (dots.h).
//
// All of it is there for float and, where the processor multiplies them, for bfloat16_pair, whose matrices hold two
// bfloat16 along the depth in an element, so that the depth is half as long, and which are summed in float.
//
// The tiles' sums over a long depth are cut at about tuning().depth, for cache and for accuracy. Every element is
// summed in the same order whichever thread computes it. For level.h.
#pragma once

#include "dots.h"
#include "exp.h"
#include "row_products.h"
#include "tiles.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// A panel of b is as wide as one tile or as several: a is read once for all of them. A row of a narrow tile (AVX2) is
// one line of the cache, or half of one, far from the next.
constexpr int64_t kPanelCols = max(64, kTileCols);
constexpr bool kHasNarrowTiles = kTileCols < kPanelCols;
// Rows, measured on AMD Zen 4; the last on Intel Emerald Rapids:
constexpr int64_t kFinishRows = 48;         // between the tiles and the activation
constexpr int64_t kBlockRows = 256;         // about, of a, beside a panel of b in the second-level cache
constexpr int64_t kMinFetchRows = 48;       // of a, during which the next panel is worth fetching
constexpr int64_t kMinSplitRows = 48;       // worth dividing among threads
constexpr int64_t kMostPanelOutputs = 512;  // of W, which may be packed rather than those of x
constexpr int64_t kMinPackRows = 256;       // of a, for which copies are worth making where tiles are wide

// --- product: c = a b or a^T b. A task is a row of tiles, or a panel of columns where there are few rows. ---

template <typename T>
bool is_split_by_rows(const Product<T>& self) {
  return self.rows >= kMinSplitRows;
}

template <typename T>
int64_t product_tasks(const Product<T>& self) {
  return is_split_by_rows(self) ? ceil_div(self.rows, kTileRows) : ceil_div(self.cols, kPanelCols);
}

// Down a column of a each tile would read a few elements of as many lines of the cache as it is deep, which pay only
// for wide tiles.
template <typename T>
bool packs_a(const Product<T>& self) {
  constexpr int64_t most_lines = 64;  // which stay in the first-level cache from one tile to the next
  const bool is_worth_it = kHasNarrowTiles
                               ? self.depth > most_lines
                               : tuning().copies && self.depth > tuning().depth && self.rows >= kMinPackRows;
  return is_worth_it && self.a_transposed && self.cols > kPanelCols;
}

// Whether panels of b are copied for a product of so many rows. Rows of b that are a page apart, or half of one, fall
// into a few sets of the first-level cache, those where c goes among them. Narrow tiles gain by copies otherwise too,
// but not for a few rows (measured with AVX2 on Intel Emerald Rapids).
template <typename T>
bool packs_b(const Product<T>& self, int64_t rows) {
  constexpr int64_t page = 4096 / sizeof(float);
  return kHasNarrowTiles ? rows > (self.b.stride % page == 0 ? 8 : 64)
                         : tuning().copies && self.b.stride % (page / 2) == 0 && rows >= kMinPackRows;
}

template <typename T>
int64_t product_scratch(const Product<T>& self) {
  // Bounds of equal_part that do not fall with the depth: memory for a minibatch has to do for a shorter one.
  const int64_t most_depth = min(self.depth, tuning().depth * 3 / 2), most_rows = min(self.rows, kBlockRows * 3 / 2);
  return most_depth * (kPanelCols + (packs_a(self) ? most_rows : 0));
}

// (depth, cols) of b, kTileCols columns after the other, with the rows filled up with zeros to whole vectors.
template <typename T>
void pack(Rows<const T> b, int64_t depth, int64_t cols, T* panel) {
  for (int64_t p = 0; p < depth; ++p) {
    const T* from = b.data + p * b.stride;
    for (int64_t j = 0; j < cols; j += kTileCols) {
      const int64_t left = min(cols - j, kTileCols), width = ceil_div(left, kLanes) * kLanes;
      T* to = panel + j * depth + p * width;
      if (left == kTileCols) {
        TORCH_MLP_UNROLL
        for (int64_t k = 0; k < kTileCols; k += kLanes) {
          store(to + k, load(from + j + k));
        }
      } else {
        for (int64_t k = 0; k < left; k += kLanes) {
          store(to + k, left - k >= kLanes ? load(from + j + k) : load_part(from + j + k, left - k));
        }
      }
    }
  }
}

// The rows of a, which is read down its columns, tile by tile.
template <typename T>
void pack_tiles(Broadcast<T> a, int64_t rows, int64_t depth, T* panel) {
  const auto pack_tile = [&](int64_t begin, auto height) {
    T* to = panel + begin * depth;
    const T* from = a.data + begin;
    for (int64_t p = 0; p < depth; ++p, to += height, from += a.depth_stride) {
      for (int64_t i = 0; i < height; ++i) {
        to[i] = from[i];
      }
    }
  };
  for_each_tile(
      rows, [&](int64_t begin) { pack_tile(begin, std::integral_constant<int64_t, kTileRows>{}); },
      [&](int64_t begin, int64_t end) { pack_tile(begin, end - begin); });
}

template <typename T>
void product(const Product<T>& self, int64_t begin, int64_t end, T* scratch) {
  const bool by_rows = is_split_by_rows(self);
  const int64_t first_row = by_rows ? begin * kTileRows : 0, first_col = by_rows ? 0 : begin * kPanelCols;
  const int64_t last_row = by_rows ? min(self.rows, end * kTileRows) : self.rows;
  const int64_t last_col = by_rows ? self.cols : min(self.cols, end * kPanelCols);
  // Where all of b stays in cache as it is, c is written row by row; else a part of a does, beside a panel of b.
  const int64_t b_cols = last_col - first_col;
  const bool keeps_b = !kHasNarrowTiles && b_cols % kLanes == 0 && self.depth * b_cols <= tuning().cached_floats;
  const bool packs_panels = packs_b(self, last_row - first_row);
  const int64_t most_rows = keeps_b ? kTileRows : equal_part(last_row - first_row, kBlockRows);
  const int64_t most_depth = equal_part(self.depth, tuning().depth);
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
      if (self.rows == 1) {
        row_product(a, {self.b.data + first_col, self.b.stride}, self.c.data + first_col, self.depth, b_cols,
                    self.accumulates);
        continue;
      }
    }
    for (int64_t p = 0; p < self.depth; p += most_depth) {
      const int64_t depth = min(self.depth - p, most_depth);
      const T* of_b = self.b.data + p * self.b.stride;
      const Broadcast<T> of_a{a.data + p * a.depth_stride, a.row_stride, a.depth_stride};
      T* const packed_a = scratch + most_depth * kPanelCols;
      if (packs_a(self)) {
        pack_tiles(of_a, rows, depth, packed_a);
      }
      for (int64_t panel = first_col; panel < last_col; panel += kPanelCols) {
        const int64_t panel_end = min(last_col, panel + kPanelCols);
        const bool packs = packs_panels || (panel_end - panel) % kLanes;
        if (packs) {
          pack<T>({of_b + panel, self.b.stride}, depth, panel_end - panel, scratch);
        }
        for (int64_t col = panel; col < panel_end; col += kTileCols) {
          const int64_t cols = min(panel_end - col, kTileCols), next = col + kPanelCols;
          const Rows<const T> b = packs
                                      ? Rows<const T>{scratch + (col - panel) * depth, ceil_div(cols, kLanes) * kLanes}
                                      : Rows<const T>{of_b + col, self.b.stride};
          const bool fetches = !keeps_b && rows >= kMinFetchRows && (next < last_col || p + depth < self.depth);
          const Ahead<T> ahead{
              {next < last_col ? of_b + next : of_b + depth * self.b.stride + first_col + col - panel, self.b.stride},
              fetches ? depth : 0,
              kTileCols};
          const Matrix c{self.c.data + row * self.c.stride + col, self.c.stride};
          const bool adds = p > 0 || self.accumulates;
          if (packs_a(self)) {
            tiles<true>(rows, depth, PackedTiles<T>{packed_a, depth}, b, c, cols, adds, ahead);
          } else if (self.a_transposed) {
            tiles<true>(rows, depth, of_a, b, c, cols, adds, ahead);
          } else {
            tiles<false>(rows, depth, of_a, b, c, cols, adds, ahead);
          }
        }
      }
    }
  }
}

// --- linear by panels. A task is kLanes rows of the other operand with a panel of kPanelCols rows of the first. ---

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

int64_t panel_elements(const LinearShape& shape) { return shape.in_features * kPanelCols; }

template <typename T, typename Out>
void linear_by_panels(const LinearForward<T, Out>& self, int64_t begin, int64_t end, T* scratch) {
  const LinearShape& shape = self.shape;
  const bool is_transposed = puts_x_in_panels(shape);
  const Rows<const T>& first = is_transposed ? self.input : self.weight;
  const Rows<const T>& other = is_transposed ? self.weight : self.input;
  const int64_t first_rows = is_transposed ? shape.batch : shape.out_features;
  const int64_t other_rows = is_transposed ? shape.out_features : shape.batch;
  const int64_t tasks = ceil_div(other_rows, kLanes);  // of one panel
  const int64_t depth = shape.in_features, most_depth = equal_part(depth, tuning().depth);
  while (begin < end) {
    const int64_t panel = begin / tasks, next = min(end, (panel + 1) * tasks), row = panel * kPanelCols;
    const int64_t rows = min(first_rows - row, kPanelCols), width = ceil_div(rows, kLanes) * kLanes;
    const int64_t last = min(other_rows, (next - panel * tasks) * kLanes);
    for (int64_t j = 0; j < rows; j += kTileCols) {
      pack_transposed<T>({first.data + (row + j) * first.stride, first.stride}, min(rows - j, kTileCols), depth,
                         scratch + j * depth);
    }
    for (int64_t n = begin % tasks * kLanes; n < last; n += kFinishRows) {
      const int64_t count = min(last - n, kFinishRows), y_row = is_transposed ? row : n,
                    y_col = is_transposed ? n : row;
      const Rows<Out> y{self.output.data + y_row * self.output.stride + y_col, self.output.stride};
      const Matrix block{reinterpret_cast<float*>(scratch + panel_elements(shape)), width};
      for (int64_t p = 0; p < depth; p += most_depth) {
        const Broadcast<T> a{other.data + n * other.stride + p, other.stride, 1};
        for (int64_t j = 0; j < width; j += kTileCols) {
          const int64_t cols = min(width - j, kTileCols);
          tiles<false, T>(count, min(depth - p, most_depth), a, {scratch + j * depth + p * cols, cols},
                          {block.data + j, width}, cols, p > 0, {});
        }
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
  return puts_x_in_panels(shape) ? ceil_div(shape.batch, kPanelCols) * ceil_div(shape.out_features, kLanes)
                                 : ceil_div(shape.out_features, kPanelCols) * ceil_div(shape.batch, kLanes);
}

template <typename T>
int64_t linear_scratch(const LinearShape& shape) {
  return by_dots<T>(shape) ? 0 : panel_elements(shape) + kFinishRows * kPanelCols;
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

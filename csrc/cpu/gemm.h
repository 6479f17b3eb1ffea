// Matrix products of the sizes that multilayer perceptrons have, a tile of the result in registers at a time.
//
// One tile serves all three products of a linear layer, c (+)= a b with the vectors along a row of b and c and one
// element of a broadcast to all lanes; a may be read along its rows or down its columns:
//
//   product   grad_input = gz W             b = W, as it lies in memory
//   product   grad_weight = gz^T x          b = x, as it lies in memory, and a = gz down its columns
//   linear    y^T = W x^T                   b = x^T: a panel of kTileCols rows of x is transposed once, and used by all
//                                           rows of W; each block of y^T gets bias and activation, and is transposed
//                                           back, while it is in the first-level cache
//
// So the weight, the larger operand for the batches that come here, is never packed. linear also has a tile of dot
// products along in_features, which needs no transposed panel: for a few rows of x, or a few outputs.
//
// The tiles' sums over a long depth are cut at kTileDepth, for cache and for accuracy. Every element is summed in the
// same order whichever thread computes it. For level.h.
#pragma once

#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// The accumulators, a row of b and one element of a fill the registers: 24 + 4 + 1 of 32, or 12 + 2 + 1 of 16.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
constexpr int kTileCols = kTileVectors * kLanes;
constexpr int64_t kTileDepth = 256;
// Rows of a narrow tile lie too far apart in b for the processor to fetch them ahead: such panels are copied.
constexpr bool kPacksAllPanels = kTileCols * sizeof(float) < 256;
constexpr int64_t kBlockRows = 48;  // of y^T between the tiles and the activation
constexpr int64_t kProductTaskRows = 24;
constexpr int64_t kCachedFloats = 1 << 17;  // half a megabyte, of a second-level cache of one or two

// Operand a of a tile: element (i, p) lies at data[i * row_stride + p * depth_stride].
struct Broadcast {
  const float* data;
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
template <int rows, int vectors>
__attribute__((noinline)) void tile(int64_t depth, Broadcast a, ConstMatrix b, Matrix c, int64_t cols,
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
        sum[i][j] += element * b_row[j];
      }
    }
  }
  if (accumulates) {
    add_or_store<true>(sum, c, cols - (vectors - 1) * kLanes);
  } else {
    add_or_store<false>(sum, c, cols - (vectors - 1) * kLanes);
  }
}

template <int most_rows, int vectors>
TORCH_MLP_INLINE void tile_of(int64_t rows, int64_t depth, Broadcast a, ConstMatrix b, Matrix c, int64_t cols,
                              bool accumulates) {
  if (rows == most_rows) {
    tile<most_rows, vectors>(depth, a, b, c, cols, accumulates);
  } else if constexpr (most_rows > 1) {
    tile_of<most_rows - 1, vectors>(rows, depth, a, b, c, cols, accumulates);
  }
}

// The tiles of one panel of at most kTileCols columns, one below the other and of about the same height.
template <int vectors = kTileVectors>
void tiles(int64_t rows, int64_t depth, Broadcast a, ConstMatrix b, Matrix c, int64_t cols, bool accumulates) {
  if constexpr (vectors > 1) {
    if (cols <= (vectors - 1) * kLanes) {
      return tiles<vectors - 1>(rows, depth, a, b, c, cols, accumulates);
    }
  }
  const int64_t count = ceil_div(rows, kTileRows);
  for (int64_t t = 0, begin = 0; t < count; ++t) {
    const int64_t end = rows * (t + 1) / count;
    tile_of<kTileRows, vectors>(end - begin, depth, {a.data + begin * a.row_stride, a.row_stride, a.depth_stride}, b,
                                {c.data + begin * c.stride, c.stride}, cols, accumulates);
    begin = end;
  }
}

// --- product: c = a b or a^T b. A task is a part of the rows of a panel of columns. ---

int64_t product_tasks(const Product& self) {
  return ceil_div(self.cols, kTileCols) * ceil_div(self.rows, kProductTaskRows);
}

int64_t product_scratch(const Product&) { return kTileDepth * kTileCols; }

// (depth, cols) of b with the rows filled up with zeros to whole vectors.
ConstMatrix pack(ConstMatrix b, int64_t depth, int64_t cols, float* panel) {
  const int64_t whole = whole_vectors(cols), width = ceil_div(cols, kLanes) * kLanes;
  for (int64_t p = 0; p < depth; ++p) {
    const float* from = b.data + p * b.stride;
    float* to = panel + p * width;
    for (int64_t j = 0; j < whole; j += kLanes) {
      store(to + j, load(from + j));
    }
    if (whole < cols) {
      store(to + whole, load_part(from + whole, cols - whole));
    }
  }
  return {panel, width};
}

void product(const Product& self, int64_t begin, int64_t end, float* scratch) {
  // The tasks go through the panels of a block of rows where b stays in cache meanwhile, so that c is written row by
  // row; else through the rows of a panel, so that b is read once.
  const int64_t panels = ceil_div(self.cols, kTileCols), blocks = ceil_div(self.rows, kProductTaskRows);
  const bool goes_by_rows = self.depth * self.cols <= kCachedFloats;
  const int64_t run = goes_by_rows ? panels : blocks;
  for (int64_t next; begin < end; begin = next) {
    next = min(end, (begin / run + 1) * run);
    const int64_t block = goes_by_rows ? begin / run : begin % run, panel = goes_by_rows ? begin % run : begin / run;
    const int64_t last_block = goes_by_rows ? block + 1 : block + (next - begin);
    const int64_t last_panel = goes_by_rows ? panel + (next - begin) : panel + 1;
    const int64_t row = block * kProductTaskRows, rows = min(self.rows, last_block * kProductTaskRows) - row;
    const Broadcast a = self.a_transposed ? Broadcast{self.a.data + row, 1, self.a.stride}
                                          : Broadcast{self.a.data + row * self.a.stride, self.a.stride, 1};
    for (int64_t p = 0; p < self.depth; p += kTileDepth) {
      const int64_t depth = min(self.depth - p, kTileDepth);
      for (int64_t col = panel * kTileCols; col < min(self.cols, last_panel * kTileCols); col += kTileCols) {
        const int64_t cols = min(self.cols - col, kTileCols);
        const ConstMatrix b{self.b.data + p * self.b.stride + col, self.b.stride};
        tiles(rows, depth, {a.data + p * a.depth_stride, a.row_stride, a.depth_stride},
              kPacksAllPanels || cols % kLanes ? pack(b, depth, cols, scratch) : b,
              {self.c.data + row * self.c.stride + col, self.c.stride}, cols, p > 0);
      }
    }
  }
}

// --- linear by panels of x^T. A task is kLanes outputs of a panel of rows of x. ---

// (depth, rows) = the transpose of x (rows, depth), the rows filled up with zeros to whole vectors.
void pack_transposed(ConstMatrix x, int64_t rows, int64_t depth, float* panel) {
  const int64_t width = ceil_div(rows, kLanes) * kLanes;
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t p = 0; p < depth; p += kLanes) {
      const float* from = x.data + i * x.stride + p;
      float* to = panel + p * width + i;
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

// The part of y that a block of y^T (outputs, rows) holds, from there on with bias and activation.
template <ActivationKind kind>
void finish_block(const float* block, int64_t width, const float* bias, int64_t outputs, int64_t rows, Matrix y) {
  for (int64_t n = 0; n < outputs; n += kLanes) {
    const int64_t left = min(outputs - n, kLanes);
    for (int64_t i = 0; i < rows; i += kLanes) {
      vec square[kLanes];
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        const vec z = load(block + (n + l) * width + i);
        square[l] = activation<kind>(bias && l < left ? z + bias[n + l] : z);
      }
      transpose(square);
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        if (i + l < rows) {
          float* to = y.data + (i + l) * y.stride + n;
          left == kLanes ? store(to, square[l]) : store_part(to, square[l], left);
        }
      }
    }
  }
}

int64_t panel_floats(const LinearShape& shape) { return shape.in_features * kTileCols; }

void linear_by_panels(const LinearForward& self, int64_t begin, int64_t end, float* scratch) {
  const LinearShape& shape = self.shape;
  const int64_t tasks = ceil_div(shape.out_features, kLanes);  // of one panel
  float* block = scratch + panel_floats(shape);
  while (begin < end) {
    const int64_t panel = begin / tasks, next = min(end, (panel + 1) * tasks), row = panel * kTileCols;
    const int64_t rows = min(shape.batch - row, kTileCols), width = ceil_div(rows, kLanes) * kLanes;
    const int64_t last_output = min(shape.out_features, (next - panel * tasks) * kLanes);
    pack_transposed({self.input.data + row * self.input.stride, self.input.stride}, rows, shape.in_features, scratch);
    for (int64_t n = begin % tasks * kLanes; n < last_output; n += kBlockRows) {
      const int64_t outputs = min(last_output - n, kBlockRows);
      for (int64_t p = 0; p < shape.in_features; p += kTileDepth) {
        tiles(outputs, min(shape.in_features - p, kTileDepth),
              {self.weight.data + n * self.weight.stride + p, self.weight.stride, 1}, {scratch + p * width, width},
              {block, width}, width, p > 0);
      }
      dispatch(self.activation, [&](auto act) {
        finish_block<act.value>(block, width, self.bias ? self.bias + n : nullptr, outputs, rows,
                                {self.output.data + row * self.output.stride + n, self.output.stride});
      });
    }
    begin = next;
  }
}

// --- linear by dot products along in_features. A task is kDotTaskRows rows of x and kDotTaskOutputs of W. ---

constexpr int kDotRows = kLanes == 16 ? 4 : 2;
constexpr int kDotOutputs = 4;
constexpr int64_t kDotTaskRows = 16, kDotTaskOutputs = 16;

// sum[i * outputs + j] += x_i w_j for the first count floats of x and w, or a whole vector of them.
template <int rows, int outputs, bool is_whole>
TORCH_MLP_INLINE void add_dots(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t count,
                               vec* sum) {
  vec of_w[outputs];
  TORCH_MLP_UNROLL
  for (int j = 0; j < outputs; ++j) {
    of_w[j] = load_some<is_whole>(w + j * w_stride, count);
  }
  TORCH_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    const vec of_x = load_some<is_whole>(x + i * x_stride, count);
    TORCH_MLP_UNROLL
    for (int j = 0; j < outputs; ++j) {
      sum[i * outputs + j] += of_x * of_w[j];
    }
  }
}

template <int rows, int outputs>
__attribute__((noinline)) void dot_tile(const LinearForward& self, int64_t row, int64_t n) {
  constexpr int count = rows * outputs, groups = (count + kLanes - 1) / kLanes;
  const int64_t depth = self.shape.in_features, whole = whole_vectors(depth);
  const int64_t x_stride = self.input.stride, w_stride = self.weight.stride;
  const float *x = self.input.data + row * x_stride, *w = self.weight.data + n * w_stride;
  vec sum[groups * kLanes] = {};
  for (int64_t p = 0; p < whole; p += kLanes) {
    add_dots<rows, outputs, true>(x + p, x_stride, w + p, w_stride, kLanes, sum);
  }
  if (whole < depth) {
    add_dots<rows, outputs, false>(x + whole, x_stride, w + whole, w_stride, depth - whole, sum);
  }

  float z[groups * kLanes], of_bias[groups * kLanes] = {};
  if (self.bias) {
    TORCH_MLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      memcpy(of_bias + i * outputs, self.bias + n, outputs * sizeof(float));
    }
  }
  dispatch(self.activation, [&](auto act) {
    TORCH_MLP_UNROLL
    for (int g = 0; g < groups; ++g) {
      vec group[kLanes];
      memcpy(group, sum + g * kLanes, sizeof(group));
      store(z + g * kLanes, activation<act.value>(sums_of(group) + load(of_bias + g * kLanes)));
    }
  });
  TORCH_MLP_UNROLL
  for (int i = 0; i < rows; ++i) {
    memcpy(self.output.data + (row + i) * self.output.stride + n, z + i * outputs, outputs * sizeof(float));
  }
}

template <int rows = kDotRows, int outputs = kDotOutputs>
TORCH_MLP_INLINE void dot_tile_of(int64_t row_count, int64_t output_count, const LinearForward& self, int64_t row,
                                  int64_t n) {
  if (row_count < rows) {
    if constexpr (rows > 1) {
      dot_tile_of<rows - 1, outputs>(row_count, output_count, self, row, n);
    }
  } else if (output_count < outputs) {
    if constexpr (outputs > 1) {
      dot_tile_of<rows, outputs - 1>(row_count, output_count, self, row, n);
    }
  } else {
    dot_tile<rows, outputs>(self, row, n);
  }
}

void linear_by_dots(const LinearForward& self, int64_t begin, int64_t end) {
  const int64_t row_tasks = ceil_div(self.shape.batch, kDotTaskRows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first_row = task % row_tasks * kDotTaskRows, first_n = task / row_tasks * kDotTaskOutputs;
    const int64_t last_row = min(first_row + kDotTaskRows, self.shape.batch);
    const int64_t last_n = min(first_n + kDotTaskOutputs, self.shape.out_features);
    for (int64_t n = first_n; n < last_n; n += kDotOutputs) {
      for (int64_t row = first_row; row < last_row; row += kDotRows) {
        dot_tile_of(min(last_row - row, kDotRows), min(last_n - n, kDotOutputs), self, row, n);
      }
    }
  }
}

// With fewer rows, or fewer outputs, the panel costs more than it saves.
bool by_dots(const LinearShape& shape) { return shape.batch < 16 || shape.out_features <= 16; }

int64_t linear_tasks(const LinearShape& shape) {
  return by_dots(shape) ? ceil_div(shape.batch, kDotTaskRows) * ceil_div(shape.out_features, kDotTaskOutputs)
                        : ceil_div(shape.batch, kTileCols) * ceil_div(shape.out_features, kLanes);
}

int64_t linear_scratch(const LinearShape& shape) {
  return by_dots(shape) ? 0 : panel_floats(shape) + kBlockRows * kTileCols;
}

void linear(const LinearForward& self, int64_t begin, int64_t end, float* scratch) {
  by_dots(self.shape) ? linear_by_dots(self, begin, end) : linear_by_panels(self, begin, end, scratch);
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

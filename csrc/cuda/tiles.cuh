// Matrix products of float32 on CUDA cores, tile by tile, for a kernel that does more than one product or something
// with its elements: result (row, col) = sum_k left(row, k) right(col, k), for left and right of some rows. The tiles
// are in launch.h.
//
// Threads: a block for each tile; a thread has 16 elements of the tile, and as many groups of threads as then remain
// split the sum, in an order that the shapes alone decide.
#pragma once

#include <iterator>

#include "common.cuh"

namespace torch_mlp {
namespace {

constexpr int kMicro = 4;            // a thread has so many rows and columns of a tile
constexpr int kPad = 4;              // between the columns of a panel, so that threads store to different banks
constexpr int kSharedFloats = 9216;  // the panels of the largest tile
constexpr int kSectorFloats = 8;     // what memory is read by at least

template <int rows_, int cols_>
struct Tile {
  static constexpr int rows = rows_, cols = cols_;
  static constexpr int panel_depth = rows * cols < kThreads ? kThreads : kThreads / 2;
  static constexpr int groups = kThreads * kMicro * kMicro / (rows * cols);
  static_assert(panel_depth * (rows + cols + 2 * kPad) <= kSharedFloats, "expected panels that fit shared memory");
  static_assert(kThreads * kMicro * kMicro <= kSharedFloats, "expected sums that fit shared memory");
};

template <typename Body>
__device__ void dispatch_tile(int tile, const Body& body) {
  static_assert(std::size(kTiles) == 3, "expected as many tiles as here");
  if (tile == 0) {
    body(Tile<kTiles[0].rows, kTiles[0].cols>{});
  } else if (tile == 1) {
    body(Tile<kTiles[1].rows, kTiles[1].cols>{});
  } else {
    body(Tile<kTiles[2].rows, kTiles[2].cols>{});
  }
}

// A matrix (rows, depth), or its transpose in memory: (depth, rows), which a row of ones may follow; ones is null or
// points to a 1.
template <bool is_transposed_>
struct Operand {
  static constexpr bool is_transposed = is_transposed_;
  const float* data;
  int64_t rows, stride;
  const float* ones = nullptr;

  __device__ int64_t all_rows() const { return rows + (ones ? 1 : 0); }
};

// Some rows of an operand on their way to shared memory, (depth, size + kPad) there. A thread has one row of it.
template <int size, int depth, typename Operand>
struct Panel {
  static constexpr int width = size + kPad, step = kThreads / size, count = depth / step;
  static_assert(kThreads % (kSectorFloats * size) == 0, "expected whole sectors of each row");
  const float* line;
  int64_t stride;
  int row, k;
  bool is_inside;
  float values[count];

  __device__ Panel(const Operand& self, int64_t first_row) {
    const int thread = int(threadIdx.x), of_sector = thread / kSectorFloats;
    row = Operand::is_transposed ? thread % size : of_sector % size;
    k = Operand::is_transposed ? thread / size : thread % kSectorFloats + of_sector / size * kSectorFloats;
    const int64_t at = first_row + row;
    const bool is_ones = Operand::is_transposed && at >= self.rows;
    is_inside = at < self.all_rows();
    line = is_ones ? self.ones : self.data + at * (Operand::is_transposed ? 1 : self.stride);
    stride = is_ones ? 0 : self.stride;
  }

  // Past the first-level cache, for other blocks write what is read. A whole panel takes no comparisons.
  __device__ void fetch(int64_t begin, int64_t end) {
    const int64_t along = Operand::is_transposed ? stride : 1, step_stride = step * along;
    const int left = end - begin < depth ? int(end - begin) : depth;
    const float* at = line + (begin + k) * along;
    if (is_inside && left == depth) {
#pragma unroll
      for (int n = 0; n < count; ++n) {
        values[n] = __ldcg(at);
        at += step_stride;
      }
    } else {
#pragma unroll
      for (int n = 0; n < count; ++n) {
        values[n] = is_inside && k + n * step < left ? __ldcg(at) : 0.0f;
        at += step_stride;
      }
    }
  }

  __device__ void put(float* shared) const {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      shared[(k + n * step) * width + row] = values[n];
    }
  }
};

// One tile. The epilogue loads what it needs for an element before the product, and takes the element after it.
template <typename Tile, typename Left, typename Right, typename Epilogue>
__device__ __noinline__ void tile_product(float* shared, Left left, Right right, int64_t depth, int64_t first_row,
                                          int64_t first_col, Epilogue epilogue) {
  constexpr int rows = Tile::rows, cols = Tile::cols, panel_depth = Tile::panel_depth, groups = Tile::groups;
  constexpr int elements = ceil_div(rows * cols, kThreads);
  const int thread = int(threadIdx.x), position = thread % (kThreads / groups), group = thread / (kThreads / groups);
  const int micro_row = position / (cols / kMicro) * kMicro, micro_col = position % (cols / kMicro) * kMicro;
  const auto for_each_element = [&](const auto& body) {
#pragma unroll
    for (int n = 0; n < elements; ++n) {
      const int at = thread + n * kThreads;
      const int64_t row = first_row + at / cols, col = first_col + at % cols;
      if (at < rows * cols && row < left.all_rows() && col < right.all_rows()) {
        body(n, at, row, col);
      }
    }
  };

  Panel<rows, panel_depth, Left> left_panel(left, first_row);
  Panel<cols, panel_depth, Right> right_panel(right, first_col);
  float* const left_shared = shared;
  float* const right_shared = shared + panel_depth * left_panel.width;
  left_panel.fetch(0, depth);
  right_panel.fetch(0, depth);
  typename Epilogue::Loaded loaded[elements];
  for_each_element([&](int n, int, int64_t row, int64_t col) { loaded[n] = epilogue.load(row, col); });
  float sums[kMicro][kMicro] = {};
  for (int64_t begin = 0; begin < depth; begin += panel_depth) {
    __syncthreads();  // the threads may still be reading what was there
    left_panel.put(left_shared);
    right_panel.put(right_shared);
    __syncthreads();
    if (begin + panel_depth < depth) {  // while this panel is multiplied
      left_panel.fetch(begin + panel_depth, depth);
      right_panel.fetch(begin + panel_depth, depth);
    }
    const int count = depth - begin < panel_depth ? int(depth - begin) : panel_depth;
#pragma unroll 4
    for (int k = group; k < count; k += groups) {
      const auto x = load(left_shared + k * left_panel.width + micro_row, PackIndex<kMicro>{0, 0});
      const auto y = load(right_shared + k * right_panel.width + micro_col, PackIndex<kMicro>{0, 0});
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j) {
          sums[i][j] += x.values[i] * y.values[j];
        }
      }
    }
  }

  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    Pack<float, kMicro> pack;
#pragma unroll
    for (int j = 0; j < kMicro; ++j) {
      pack.values[j] = sums[i][j];
    }
    store(shared + (group * rows + micro_row + i) * cols + micro_col, PackIndex<kMicro>{0, 0}, pack);
  }
  __syncthreads();
  for_each_element([&](int n, int at, int64_t row, int64_t col) {
    float sum = 0;
#pragma unroll 8
    for (int g = 0; g < groups; ++g) {
      sum += shared[g * rows * cols + at];
    }
    epilogue.take(row, col, sum, loaded[n]);
  });
}

// All tiles, dealt to the blocks from number offset % blocks on; returns how many there are. after(first_row, rows) of
// each. They are few enough to be counted in 32 bits, in which a division takes a fraction of the time.
template <typename Left, typename Right, typename Epilogue, typename After>
__device__ uint32_t product(float* shared, int tile, const Left& left, const Right& right, int64_t depth,
                            const Epilogue& epilogue, uint32_t offset, const After& after) {
  const uint32_t blocks = gridDim.x, block = blockIdx.x, first = (block + (blocks - offset % blocks)) % blocks;
  uint32_t tiles = 0;
  dispatch_tile(tile, [&](auto shape) {
    using Shape = decltype(shape);
    const auto across = uint32_t(ceil_div(right.all_rows(), Shape::cols));
    tiles = across * uint32_t(ceil_div(left.all_rows(), Shape::rows));
    for (uint32_t at = first; at < tiles; at += blocks) {
      const int64_t first_row = int64_t(at / across) * Shape::rows, first_col = int64_t(at % across) * Shape::cols;
      tile_product<Shape>(shared, left, right, depth, first_row, first_col, epilogue);
      after(first_row, int64_t(Shape::rows));
    }
  });
  return tiles;
}

}  // namespace
}  // namespace torch_mlp

// How the work of the CUDA kernels is split: into blocks and threads, into 16-byte accesses, and into parts that fit
// the memory. In plain C++, so that tests/launch/launch.cpp can check it without a GPU; the kernels are in the .cu
// files.
//
// A split depends on the shapes alone, so that sums have the same bits in every run. Sizes are int64 throughout. A grid
// has at least one block, also where there is no work, so that sums over no rows come out as 0.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../ceil_div.h"

namespace torch_mlp {

constexpr int kThreads = 256;  // of every block
constexpr int kWarpThreads = 32;
constexpr int kAccessBytes = 16;                                     // the widest load and store
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // in a row of a grid, as many as CUDA takes

// The partial sums of a loss: at most this many. A few times the blocks that a large device holds at once, so that none
// waits long for the last.
constexpr int64_t kMaxSumBlocks = 4096;

// The grid of a kernel whose blocks take block_work at a time and stride over what is left: at most so many blocks.
inline unsigned int blocks_of(int64_t work, int64_t block_work, int64_t most = kMaxBlocks) {
  return static_cast<unsigned int>(std::clamp<int64_t>(ceil_div(work, block_work), 1, most));
}

// --- adjacent elements ---

// How many elements one 16-byte access holds.
template <typename scalar_t>
constexpr int kPackWidth = kAccessBytes / int(sizeof(scalar_t));

// How many elements a pointer lies past a 16-byte boundary. The host asks: in a kernel, the compiler loses track of
// what a pointer may alias once its address is taken for a number.
template <typename scalar_t>
int phase_of(const scalar_t* pointer) {
  return int(reinterpret_cast<uintptr_t>(pointer) % kAccessBytes / sizeof(scalar_t));
}

// Where a pack lies in a row: the pack of that number behind the head. Kept apart from the number of its first element,
// through which the compiler does not see that the access is aligned, and would store the elements one by one.
template <int pack_width>
struct PackIndex {
  static constexpr int width = pack_width;
  int64_t head, number;

  C10_DEVICE int64_t first() const { return head + number * width; }
};

// Shares count adjacent elements among `lanes` threads, of which this is number `lane`; the first element lies `phase`
// elements past a 16-byte boundary. Calls body with the PackIndex of each aligned pack, and of the few elements before
// the first boundary and after the last one, as packs of one; all come alone where phase is negative. `unroll` accesses
// of a thread are under way at once.
template <typename scalar_t, int unroll = 2, typename Body>
C10_DEVICE void for_each_pack(int64_t phase, int64_t count, int64_t lane, int64_t lanes, const Body& body) {
  constexpr int width = kPackWidth<scalar_t>;
  const int64_t before = -phase & (width - 1);
  const int64_t head = phase >= 0 && before < count ? before : count;
  const int64_t packs = (count - head) / width;
#pragma unroll unroll
  for (int64_t k = lane; k < packs; k += lanes) {
    body(PackIndex<width>{head, k});
  }
#pragma unroll 1
  for (int64_t k = lane; k < count - packs * width; k += lanes) {
    body(PackIndex<1>{0, k < head ? k : k + packs * width});
  }
}

// --- rows of logits, which some threads share ---

// Up to so many classes a row belongs to a few threads, or to a warp.
constexpr int kFewLanes = 4;
constexpr int64_t kNarrowClasses = 128;
constexpr int64_t kWarpClasses = 1024;

// Calls body with the number of threads that share a row, a compile-time constant: few, a warp, or a block.
template <typename Body>
void dispatch_lanes(int64_t classes, const Body& body) {
  if (classes <= kNarrowClasses) {
    body(std::integral_constant<int, kFewLanes>{});
  } else if (classes <= kWarpClasses) {
    body(std::integral_constant<int, kWarpThreads>{});
  } else {
    body(std::integral_constant<int, kThreads>{});
  }
}

// The threads of a block of which so many share a row.
constexpr int block_threads(int lanes) { return std::max(lanes, kThreads); }

// The same for a kernel that visits a row twice, the second time in the L2 cache. There the rows of all blocks that run
// have to find room, so the longer rows are, the more threads share one and the fewer blocks run.
constexpr int64_t kBlockRowBytes = 16 << 10;
constexpr int64_t kWideBlockRowBytes = 96 << 10;

template <typename scalar_t, typename Body>
void dispatch_lanes_of_cached_rows(int64_t classes, const Body& body) {
  const int64_t bytes = classes * int64_t(sizeof(scalar_t));
  if (bytes <= kBlockRowBytes) {
    dispatch_lanes(classes, body);
  } else if constexpr (sizeof(scalar_t) == sizeof(double)) {
    dispatch_lanes(classes, body);  // a thread of a larger block has too few registers
  } else if (bytes <= kWideBlockRowBytes) {
    body(std::integral_constant<int, 2 * kThreads>{});
  } else {
    body(std::integral_constant<int, 4 * kThreads>{});
  }
}

// The grid, and so the number of partial sums, of a loss whose rows are shared by a few threads or more.
inline unsigned int sum_blocks_of(int64_t rows, int64_t classes) {
  unsigned int blocks = 0;
  dispatch_lanes(classes, [&](auto lanes) { blocks = blocks_of(rows, kThreads / lanes.value, kMaxSumBlocks); });
  return blocks;
}

// --- the columns of a matrix, summed over its rows ---

// Blocks that keep every multiprocessor busy to the end; more would only make more partial sums.
constexpr int64_t kFullGrid = 2048;
constexpr int64_t kMinRowsPerThread = 8;

// The columns that a block adds partial sums of: few, so that many threads share the long way down.
constexpr int64_t kSumCols = 8;

// Neighbouring threads hold neighbouring columns and walk down the rows of their block. Every row and column has its
// block: these kernels do not stride over what is left.
struct ColumnSplit {
  unsigned int thread_cols, thread_rows;  // the threads of a block
  unsigned int col_blocks, row_blocks;    // the blocks of the grid
  int64_t block_rows;
};

// At most so many columns in a block, a power of two, and no more blocks along the rows than make `blocks` in all.
inline ColumnSplit split_columns(int64_t rows, int64_t cols, int64_t most_thread_cols, int64_t blocks) {
  int64_t thread_cols = 1;
  // More where the grid would be too long: past 2^36 columns.
  while (thread_cols < std::min(cols, most_thread_cols) || ceil_div(cols, thread_cols) > kMaxBlocks) {
    thread_cols *= 2;
  }
  const int64_t thread_rows = kThreads / thread_cols, col_blocks = ceil_div(cols, thread_cols);
  const int64_t most_row_blocks = std::max<int64_t>(1, ceil_div(rows, kMinRowsPerThread * thread_rows));
  const int64_t block_rows =
      std::max<int64_t>(1, ceil_div(rows, std::min(ceil_div(blocks, col_blocks), most_row_blocks)));
  return {static_cast<unsigned int>(thread_cols), static_cast<unsigned int>(thread_rows),
          static_cast<unsigned int>(col_blocks), blocks_of(rows, block_rows), block_rows};
}

// --- the rows of linear_cross_entropy, some at a time ---

// Of logits at once, in whole tiles of the products' kernels: enough to fill a large device many times over. At least
// so many rows, however many the classes are: adding a chunk's gradient of the weight to the others', 12 bytes an
// element for 16-bit dtypes, takes by the peaks of an A100 or H100 as long as computing it from 1,000 rows.
constexpr int64_t kChunkBytes = 128 << 20;
constexpr int64_t kTileRows = 256;
constexpr int64_t kMinChunkRows = 2048;

// The threads that sum the gradient of the bias: as many as a large device holds at once, but no more than so many for
// a column, whose sums one warp adds.
constexpr int64_t kSumThreads = 1 << 18;
constexpr int64_t kMaxColumnThreads = 1024;

inline int64_t chunk_rows_of(int64_t rows, int64_t classes, int64_t element_bytes) {
  const int64_t row_bytes = std::max<int64_t>(1, classes) * element_bytes;
  return std::clamp<int64_t>(rows, 1, std::max(kMinChunkRows, kChunkBytes / row_bytes / kTileRows * kTileRows));
}

// One for no rows too, so that sums over them come out as 0.
inline int64_t chunks_of(int64_t rows, int64_t chunk_rows) { return std::max<int64_t>(1, ceil_div(rows, chunk_rows)); }

inline int64_t column_threads_of(int64_t chunk_rows, int64_t classes) {
  return std::clamp<int64_t>(kSumThreads / std::max<int64_t>(1, classes), 1, std::min(chunk_rows, kMaxColumnThreads));
}

// --- the kernel that trains a network alone ---

// It is for networks whose steps take so few operations that most of the time would go between kernels. Its products,
// of float32 without tensor cores, are slower than the library's, which larger ones had better use. A warp takes a row
// of logits, hence no more classes than that is good for; the layers' sizes have to fit the kernel's argument.
constexpr int64_t kMaxPersistentLayers = 8;
constexpr int64_t kMaxPersistentBatch = 1024;
constexpr int64_t kMaxPersistentParameters = 2 << 20;

// Where a step has so few multiplications, products in bfloat16 save no time: its single kernels take 150 us on an
// H200, whatever they do. How many this kernel does meanwhile in float32 is counted, not measured.
constexpr int64_t kMaxPersistentBfloat16 = 1 << 27;

constexpr bool fits_persistent(int64_t layers, int64_t classes, int64_t batch, int64_t parameters, bool bfloat16) {
  return layers <= kMaxPersistentLayers && classes <= kWarpClasses && batch >= 1 && batch <= kMaxPersistentBatch &&
         parameters <= kMaxPersistentParameters && (!bfloat16 || batch * parameters <= kMaxPersistentBfloat16);
}

// The tiles of its products: small ones for many blocks, large ones that read less.
struct TileSize {
  int rows, cols;
};
constexpr TileSize kTiles[] = {{8, 16}, {16, 32}, {32, 32}};

// What a tile costs beyond its multiplications, waiting for memory, in multiplications.
constexpr int64_t kTileOverhead = 200000;

// The number of the tile with which so many blocks are done first with a product of (rows, depth) and (depth, cols).
inline int tile_of(int64_t rows, int64_t cols, int64_t depth, int64_t blocks) {
  int best = 0;
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (const TileSize& tile : kTiles) {
    const int64_t tiles = ceil_div(rows, tile.rows) * ceil_div(cols, tile.cols);
    const int64_t cost = ceil_div(tiles, blocks) * (tile.rows * tile.cols * depth + kTileOverhead);
    if (cost < best_cost) {
      best = int(&tile - kTiles);
      best_cost = cost;
    }
  }
  return best;
}

// So many blocks can gather a minibatch while the others update weights.
constexpr int64_t kGatherBlocks = 16;

}  // namespace torch_mlp

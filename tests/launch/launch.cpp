// How csrc/cuda/launch.h splits work, for test_launch.py to compile: within CUDA's limits, and so that every element,
// row and column is taken exactly once, small ones counted one by one, sizes past 2^31 by arithmetic. Prints "split" if
// all of it holds.
#include "../../csrc/cuda/launch.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <vector>

namespace {

using namespace torch_mlp;

// The limits of every device from compute capability 5.0 on, by the CUDA programming guide.
constexpr int64_t kMaxGridX = (int64_t(1) << 31) - 1, kMaxGridY = 65535, kMaxBlock = 1024, kMaxShared = 48 << 10;

const std::vector<int64_t> kSmall{0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000};

// Around the powers of two at which 32 bits, or a grid, end: 2^44 elements fill more than any device has.
std::vector<int64_t> huge() {
  std::vector<int64_t> sizes;
  for (const int power : {31, 32, 33, 36, 37, 39, 44}) {
    for (const int64_t more : {-1, 0, 1, 1001}) {
      sizes.push_back((int64_t(1) << power) + more);
    }
  }
  return sizes;
}

const std::vector<int64_t> kHuge = huge();

std::vector<int64_t> all_sizes() {
  std::vector<int64_t> sizes = kSmall;
  for (const int64_t size : {1024, 1025, 5000, 1 << 14, 60000, 131073, 1 << 18, 1 << 20, 10000001}) {
    sizes.push_back(size);
  }
  sizes.insert(sizes.end(), kHuge.begin(), kHuge.end());
  return sizes;
}

const std::vector<int64_t> kSizes = all_sizes();

#define EXPECT(condition, ...) expect(condition, __LINE__, #condition, {__VA_ARGS__})

void expect(bool holds, int line, const char* condition, std::initializer_list<int64_t> values) {
  if (!holds) {
    std::printf("launch.cpp:%d: expected %s, for", line, condition);
    for (const int64_t value : values) {
      std::printf(" %lld", static_cast<long long>(value));
    }
    std::puts("");
    std::exit(1);
  }
}

void expect_once(const std::vector<int>& times, int64_t shape) {
  for (size_t i = 0; i < times.size(); ++i) {
    EXPECT(times[i] == 1, shape, int64_t(i), int64_t(times[i]));
  }
}

void check_blocks() {
  static_assert(kThreads <= kMaxBlock && kThreads % kWarpThreads == 0 && kMaxBlocks <= kMaxGridX);
  for (const int64_t work : kSizes) {
    for (const int64_t block_work : {1, 8, 64, 256, 2048, 4096}) {
      for (const int64_t most : {int64_t(1), kMaxSumBlocks, kMaxBlocks}) {
        const int64_t blocks = blocks_of(work, block_work, most);
        EXPECT(blocks >= 1 && blocks <= most, work, block_work, most);
        // Neither too few nor idle: all but the last block are full, unless the grid is as large as it may be.
        EXPECT(blocks == most || blocks * block_work >= work, work, block_work, most);
        EXPECT(blocks == 1 || (blocks - 1) * block_work < work, work, block_work, most);
      }
    }
  }
}

// --- adjacent elements ---

template <typename scalar_t>
void check_packs() {
  constexpr int64_t width = kPackWidth<scalar_t>;
  static_assert(width * sizeof(scalar_t) == 16);
  alignas(kAccessBytes) const scalar_t memory[kPackWidth<scalar_t> + 1] = {};
  for (int64_t i = 0; i <= width; ++i) {
    EXPECT(phase_of(memory + i) == i % width, i);
  }
  for (int64_t count = 0; count < 6 * width; ++count) {
    for (int64_t phase = -1; phase < 3 * width; ++phase) {
      for (const int64_t lanes : {1, 4, 32, 256}) {
        std::vector<int> times(size_t(count), 0);
        int64_t alone = 0;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          for_each_pack<scalar_t>(phase, count, lane, lanes, [&](auto at) {
            EXPECT(at.first() >= 0 && at.first() + at.width <= count, phase, count, lane, lanes);
            EXPECT(at.width == 1 || (at.width == width && (phase + at.first()) % width == 0), phase, count, lane);
            alone += at.width == 1;
            for (int j = 0; j < at.width; ++j) {
              ++times[size_t(at.first() + j)];
            }
          });
        }
        expect_once(times, count);
        EXPECT(phase < 0 ? width == 1 || alone == count : alone <= 2 * (width - 1) || width == 1, phase, count);
      }
    }
  }
  // The threads of a grid: each takes every lanes-th pack from its own on, and the packs end where the elements do.
  for (const int64_t count : kHuge) {
    const int64_t lanes = int64_t(kThreads) * blocks_of(count, kThreads * width);
    for (const int64_t phase : {int64_t(0), width - 1}) {
      const int64_t head = -phase & (width - 1), packs = (count - head) / width, tail = count - head - packs * width;
      EXPECT(tail < width, count, phase);
      for (const int64_t lane : {int64_t(0), int64_t(1), lanes / 2, packs - 1, lanes - 1}) {
        int64_t whole = 0, alone = 0;
        for_each_pack<scalar_t>(phase, count, lane, lanes, [&](auto at) {
          if (at.width == width && (width > 1 || whole < packs)) {
            EXPECT(at.first() == head + (lane + whole * lanes) * width, count, lane);
            ++whole;
          } else {
            EXPECT(at.first() == (lane < head ? lane : lane + packs * width), count, lane);
            ++alone;
          }
        });
        EXPECT(whole == ceil_div(std::max<int64_t>(0, packs - lane), lanes), count, lane, lanes);
        EXPECT(alone == (lane < head + tail), count, lane, lanes);
      }
    }
  }
}

// --- rows of logits ---

// The rows that a block takes, as the kernels do.
template <typename Body>
void for_each_row(int64_t block, int64_t blocks, int64_t block_rows, int64_t rows, const Body& body) {
  for (int64_t begin = block * block_rows; begin < rows; begin += blocks * block_rows) {
    body(begin, std::min(begin + block_rows, rows));
  }
}

void check_lanes() {
  for (const int64_t classes : kSizes) {
    int calls = 0, lanes = 0;
    dispatch_lanes(classes, [&](auto of_row) {
      ++calls;
      lanes = of_row.value;
    });
    EXPECT(calls == 1 && (lanes == kFewLanes || lanes == kWarpThreads || lanes == kThreads), classes, lanes);
    EXPECT(kThreads % lanes == 0, classes, lanes);
    // As few threads as need take no more than 32 elements each.
    EXPECT(lanes == kThreads || classes <= 32 * lanes, classes, lanes);
    EXPECT(lanes == kFewLanes || classes > 32 * (lanes == kThreads ? kWarpThreads : kFewLanes), classes, lanes);
  }
}

// Rows that are visited twice: the longer, the more threads, and so the fewer rows at once.
template <typename scalar_t>
void check_lanes_of_cached_rows() {
  int most = 0;
  for (const int64_t classes : kSizes) {
    int calls = 0, lanes = 0, lanes_of_one_visit = 0;
    dispatch_lanes(classes, [&](auto of_row) { lanes_of_one_visit = of_row.value; });
    dispatch_lanes_of_cached_rows<scalar_t>(classes, [&](auto of_row) {
      ++calls;
      lanes = of_row.value;
    });
    const int threads = block_threads(lanes);
    EXPECT(calls == 1 && threads % lanes == 0 && threads % kThreads == 0 && threads <= kMaxBlock, classes, lanes);
    // The partial sums are those of sum_blocks_of: a block either has kThreads or takes one row.
    EXPECT(lanes == lanes_of_one_visit || (lanes == threads && lanes_of_one_visit == kThreads), classes, lanes);
    const int64_t bytes = classes * int64_t(sizeof(scalar_t));
    EXPECT(bytes > kBlockRowBytes || lanes == lanes_of_one_visit, classes, lanes);
    EXPECT(sizeof(scalar_t) == sizeof(double) || bytes <= kWideBlockRowBytes || lanes == kMaxBlock, classes, lanes);
    EXPECT(lanes >= most, classes, lanes, most);
    most = lanes;
  }
}

void check_sum_blocks() {
  for (const int64_t classes : kSizes) {
    int64_t lanes = 0;
    dispatch_lanes(classes, [&](auto of_row) { lanes = of_row.value; });
    const int64_t block_rows = kThreads / lanes;
    for (const int64_t rows : kSizes) {
      const int64_t blocks = sum_blocks_of(rows, classes);
      EXPECT(blocks >= 1 && blocks <= kMaxSumBlocks, rows, classes);
      EXPECT(blocks == 1 || blocks == kMaxSumBlocks || (blocks - 1) * block_rows < rows, rows, classes);
      EXPECT(blocks == kMaxSumBlocks || blocks * block_rows >= rows, rows, classes);
    }
    for (const int64_t rows : kSmall) {
      const int64_t blocks = sum_blocks_of(rows, classes);
      std::vector<int> times(size_t(rows), 0);
      for (int64_t block = 0; block < blocks; ++block) {
        for_each_row(block, blocks, block_rows, rows, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            ++times[size_t(i)];
          }
        });
      }
      expect_once(times, rows);
    }
  }
  const int64_t rows = (int64_t(1) << 31) + 1001;
  int64_t taken = 0, blocks = sum_blocks_of(rows, 10);
  for (int64_t block = 0; block < blocks; ++block) {
    for_each_row(block, blocks, kThreads / kFewLanes, rows, [&](int64_t begin, int64_t end) { taken += end - begin; });
  }
  EXPECT(taken == rows, taken);
}

// --- the columns of a matrix ---

void check_columns_of(int64_t rows, int64_t cols, int64_t most_thread_cols, int64_t most_blocks) {
  const ColumnSplit split = split_columns(rows, cols, most_thread_cols, most_blocks);
  const int64_t thread_cols = split.thread_cols, thread_rows = split.thread_rows;
  EXPECT(thread_cols * thread_rows == kThreads && (thread_rows & (thread_rows - 1)) == 0, rows, cols, most_thread_cols);
  EXPECT(split.col_blocks >= 1 && split.col_blocks <= kMaxGridX, rows, cols, most_thread_cols);
  EXPECT(split.row_blocks >= 1 && split.row_blocks <= kMaxGridY, rows, cols, most_thread_cols);
  // Every row and every column has its block, and every block a row and a column.
  EXPECT(split.col_blocks * thread_cols >= cols, rows, cols, most_thread_cols);
  EXPECT((split.col_blocks - 1) * thread_cols < cols, rows, cols, most_thread_cols);
  EXPECT(split.row_blocks * split.block_rows >= rows, rows, cols, most_thread_cols);
  EXPECT((split.row_blocks - 1) * split.block_rows < std::max<int64_t>(1, rows), rows, cols, most_thread_cols);
  // Blocks enough, but where a thread would have too few rows; and not many more, whose sums would take memory.
  EXPECT(split.row_blocks == 1 || (split.row_blocks - 1) * int64_t(split.col_blocks) < most_blocks, rows, cols);
  EXPECT(split.row_blocks == 1 || 2 * split.block_rows > kMinRowsPerThread * thread_rows, rows, cols);
  EXPECT(most_blocks == 1 || 2 * int64_t(split.col_blocks) * split.row_blocks >= most_blocks ||
             split.block_rows <= kMinRowsPerThread * thread_rows,
         rows, cols);
  EXPECT(cols > kMaxGridX * most_thread_cols || thread_cols <= most_thread_cols, rows, cols, most_thread_cols);
}

void check_every_element(int64_t rows, int64_t cols, int64_t most_thread_cols, int64_t most_blocks) {
  const ColumnSplit split = split_columns(rows, cols, most_thread_cols, most_blocks);
  std::vector<int> times(size_t(rows * cols), 0);
  for (int64_t block = 0; block < split.row_blocks; ++block) {
    const int64_t begin = block * split.block_rows, end = std::min(begin + split.block_rows, rows);
    for (int64_t y = 0; y < split.thread_rows; ++y) {
      for (int64_t col = 0; col < split.col_blocks * int64_t(split.thread_cols); ++col) {
        for (int64_t i = begin + y; col < cols && i < end; i += split.thread_rows) {
          ++times[size_t(i * cols + col)];
        }
      }
    }
  }
  expect_once(times, rows);
}

void check_columns() {
  for (const int64_t rows : kSizes) {
    for (const int64_t cols : kSizes) {
      if (cols > 0 && cols <= kMaxGridX * kThreads) {
        check_columns_of(rows, cols, kWarpThreads, kFullGrid);
        // The sums of the blocks' sums.
        const ColumnSplit split = split_columns(rows, cols, kWarpThreads, kFullGrid);
        check_columns_of(split.row_blocks, cols, kSumCols, 1);
        EXPECT(split_columns(split.row_blocks, cols, kSumCols, 1).row_blocks == 1, rows, cols);
      }
    }
  }
  for (const int64_t rows : kSmall) {
    for (const int64_t cols : kSmall) {
      if (cols > 0) {
        check_every_element(rows, cols, kWarpThreads, kFullGrid);
        check_every_element(rows, cols, kSumCols, 1);
      }
    }
  }
  // A sum for each thread and element of a pack, in shared memory: float for 16-bit dtypes.
  static_assert(kThreads * std::max({kPackWidth<int16_t> * sizeof(float), kPackWidth<float> * sizeof(float),
                                     kPackWidth<double> * sizeof(double)}) <=
                kMaxShared);
}

// --- the rows of linear_cross_entropy ---

void check_chunks() {
  for (const int64_t classes : kSizes) {
    for (const int64_t bytes : {2, 4, 8}) {
      for (const int64_t rows : kSizes) {
        const int64_t chunk = chunk_rows_of(rows, classes, bytes), chunks = chunks_of(rows, chunk);
        EXPECT(chunk >= 1 && chunk <= std::max<int64_t>(1, rows), rows, classes, bytes);
        EXPECT(chunks >= 1 && chunks * chunk >= rows, rows, classes, bytes);
        EXPECT((chunks - 1) * chunk < std::max<int64_t>(1, rows), rows, classes, bytes);
        EXPECT(chunks == 1 || chunk % kTileRows == 0, rows, classes, bytes);
        EXPECT(chunk <= kMinChunkRows || chunk * classes * bytes <= kChunkBytes, rows, classes, bytes);
        EXPECT(chunks == 1 || chunk >= kMinChunkRows, rows, classes, bytes);
        EXPECT(chunks == 1 || classes == 0 || (chunk + kTileRows) * bytes > kChunkBytes / classes, rows, classes,
               bytes);

        const int64_t threads = column_threads_of(chunk, classes);
        EXPECT(threads >= 1 && threads <= chunk && threads <= kMaxColumnThreads, rows, classes, threads);
        EXPECT(threads == 1 || threads * classes <= kSumThreads, rows, classes, threads);
        EXPECT(threads == std::min(chunk, kMaxColumnThreads) || 2 * (threads + 1) * classes > kSumThreads, rows,
               classes, threads);
      }
    }
  }
}

// --- the kernel that trains a network alone ---

void check_persistent() {
  for (const bool bfloat16 : {false, true}) {
    EXPECT(fits_persistent(2, 10, 128, 784 * 128 + 128 * 10, bfloat16), bfloat16);
    EXPECT(fits_persistent(8, 1024, 1024, 1 << 17, bfloat16), bfloat16);
    EXPECT(fits_persistent(2, 10, 1024, 2 << 20, bfloat16) == !bfloat16, bfloat16);
    EXPECT(!fits_persistent(9, 10, 128, 1000, bfloat16) && !fits_persistent(2, 1025, 128, 1000, bfloat16), bfloat16);
    EXPECT(!fits_persistent(2, 10, 1025, 1000, bfloat16), bfloat16);
    EXPECT(!fits_persistent(2, 10, 128, (2 << 20) + 1, bfloat16), bfloat16);
    EXPECT(!fits_persistent(2, 10, 0, 1000, bfloat16), bfloat16);  // there is no first minibatch
  }

  // As many blocks as devices have multiprocessors.
  for (const int64_t blocks : {1, 7, 108, 132, 148}) {
    for (const int64_t rows : kSmall) {
      for (const int64_t cols : kSmall) {
        for (const int64_t depth : kSmall) {
          const int tile = tile_of(rows, cols, depth, blocks);
          EXPECT(tile >= 0 && tile < int(std::size(kTiles)), rows, cols, depth, blocks);
          // No smaller than would keep every block busy once.
          const TileSize size = kTiles[tile];
          EXPECT(tile == 0 || ceil_div(rows, kTiles[tile - 1].rows) * ceil_div(cols, kTiles[tile - 1].cols) > blocks,
                 rows, cols, depth, blocks);
          EXPECT(size.rows * size.cols <= 4 * kThreads, rows, cols, depth, blocks);
        }
      }
    }
  }
  // The layers of 784-128-10 for a batch of 128 on an H100: all tiles of a phase at once.
  static_assert(kTiles[0].rows * kTiles[0].cols * 132 >= 128 * 128);
  EXPECT(tile_of(128, 128, 784, 132) == 0, 0);
  EXPECT(tile_of(128, 785, 128, 132) == 2, 0);
}

}  // namespace

int main() {
  check_blocks();
  check_packs<int16_t>();
  check_packs<float>();
  check_packs<double>();
  check_lanes();
  check_lanes_of_cached_rows<double>();
  check_lanes_of_cached_rows<float>();
  check_lanes_of_cached_rows<uint16_t>();
  check_sum_blocks();
  check_columns();
  check_chunks();
  check_persistent();
  std::puts("split");
}

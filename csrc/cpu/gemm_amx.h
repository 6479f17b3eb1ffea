// Products of float matrices by AMX, the matrix unit of Intel's processors since Sapphire Rapids. It multiplies
// bfloat16 and sums in float, so each float is split into three bfloat16 (split_floats.h). The six products of these
// that count take 6/16 of the time of one product of floats, and their sums have no more rounding errors. What the
// three parts cannot hold is multiplied by the tiles of gemm.h.
//
// Of the two operands one is resident: a block of it is split beforehand and stays in the second-level cache. The other
// streams past it band by band, the next of which is split while the unit multiplies: this takes no time of its own,
// for the unit leaves the vector instructions to others, nor has the unit to wake up, which takes a microsecond or two
// after a pause. The longer operand streams, unless it lies in memory transposed:
//
//   product                  streams    resident
//   linear   y^T = W x^T     W          x^T
//            y = x W^T       x          W^T
//   product  gz W            W or gz    gz or W
//   product  gz^T x          x          gz^T
//
// For level.h.
#pragma once

#include "gemm.h"
#include "split_floats.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// Measured on Emerald Rapids:
constexpr int64_t kResidentLines = 256;  // about
constexpr int64_t kSplitDepth = 640;     // about

// The shapes of the eight tiles, all of them whole.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// In memory throughout: the compiler does not know how much of it is read.
constexpr TileShapes kTileShapes;

// block (kBand, kBand) = the product of two bands, steps times kTileDepth deep. Meanwhile a band of what streams is
// split, so many vectors with every four tiles.
template <typename Splitter>
TORCH_MLP_INLINE void multiply_bands(const bfloat16_pair* a, const bfloat16_pair* b, int64_t steps, Matrix block,
                                     Splitter& next, int64_t vectors) {
  // Tiles 0 to 3 hold the sums, 4 and 5 a part of a, 6 and 7 one of b.
  const auto load_a = [&](int part) {
    _tile_loadd(4, a + part * kPartPairs, kTileRowBytes);
    _tile_loadd(5, a + part * kPartPairs + kTilePairs, kTileRowBytes);
  };
  const auto load_b = [&](int part) {
    _tile_loadd(6, b + part * kPartPairs, kTileRowBytes);
    _tile_loadd(7, b + part * kPartPairs + kTilePairs, kTileRowBytes);
  };
  const auto multiply = [&] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    next.split_some(vectors);
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
  const int64_t stride = block.stride * sizeof(float);
  float* const lower = block.data + kTileSide * block.stride;
  _tile_stored(0, block.data, stride);
  _tile_stored(1, block.data + kTileSide, stride);
  _tile_stored(2, lower, stride);
  _tile_stored(3, lower + kTileSide, stride);
}
constexpr int kGroupsOfStep = 6;  // of four tiles

// For scripts/bench.py: products of tiles that wait for nothing, as many as a step of multiply_bands has. Of numbers
// like any others, for the unit multiplies zeros faster.
constexpr int64_t kSplitMultiplyAddsOfRound = kBand * kBand * kTileDepth;

float split_multiply_adds(int64_t rounds) {
  bfloat16_pair operands[4 * kTilePairs];
  uint32_t random = 1;
  for (bfloat16_pair& pair : operands) {
    random = random * 1664525 + 1013904223;
    pair.bits = (random & 0x80ff80ff) | 0x3e003e00;
  }
  float sums[kTilePairs];
  _tile_loadconfig(&kTileShapes);
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, operands, kTileRowBytes);
  _tile_loadd(5, operands + kTilePairs, kTileRowBytes);
  _tile_loadd(6, operands + 2 * kTilePairs, kTileRowBytes);
  _tile_loadd(7, operands + 3 * kTilePairs, kTileRowBytes);
  for (int64_t i = 0; i < kGroupsOfStep * rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kTileRowBytes);
  _tile_release();
  return sums[0];
}

// The lines of both operands that a thread multiplies, all of the depth.
struct SplitWork {
  Lines resident, streaming;
  int64_t resident_begin, resident_end, streaming_begin, streaming_end, depth;

  SplitWork(const Lines& resident, int64_t resident_lines, const Lines& streaming, int64_t streaming_lines,
            int64_t depth, int64_t begin, int64_t end)
      : resident(resident),
        streaming(streaming),
        resident_begin(0),
        resident_end(resident_lines),
        streaming_begin(0),
        streaming_end(streaming_lines),
        depth(depth) {
    if (resident_lines >= streaming_lines) {
      resident_begin = begin * kBand;
      resident_end = min(resident_lines, end * kBand);
    } else {
      streaming_begin = begin * kBand;
      streaming_end = min(streaming_lines, end * kBand);
    }
  }
};

// A task is a band of the longer operand.
int64_t split_tasks(int64_t resident_lines, int64_t streaming_lines) {
  return ceil_div(max(resident_lines, streaming_lines), kBand);
}

// A part of c and of the depth.
struct SplitPart {
  int64_t row, rows, col, cols, p, depth;
  bool is_first, is_last;  // of the depth
};

// What a thread cuts its work into, whole bands and steps, and its scratch memory of floats or pairs: a block of the
// resident operand and two bands of the other, one block of the result, and what the products by floats need.
struct SplitScratch {
  int64_t most_lines, most_depth;

  SplitScratch(int64_t resident_lines, int64_t depth)
      : most_lines(ceil_div(equal_part(resident_lines, kResidentLines), kBand) * kBand),
        most_depth(ceil_div(equal_part(depth, kSplitDepth), kTileDepth) * kTileDepth) {}

  int64_t band() const { return most_depth / kTileDepth * kStepPairs; }
  int64_t bands() const { return most_lines / kBand * band(); }
  int64_t block() const { return bands() + 2 * band(); }
  int64_t floats() const { return block() + kBand * kBand; }
  int64_t size() const { return floats() + most_depth * (kBand + kPanelCols); }
};

// For each part of at most a band of rows and of columns, result.block(part) gets the sums and result.finish(part) is
// called; or, where the sums would not be exact, result.multiply_floats(part) for all resident lines at once. Whether a
// streams, or b; whether the resident operand is transposed.
template <bool streams_a, bool is_transposed, typename Result>
void multiply_split(const SplitWork& work, const SplitScratch& sizes, float* scratch, const Result& result) {
  auto* const resident = reinterpret_cast<bfloat16_pair*>(scratch);
  bfloat16_pair *streaming = resident + sizes.bands(), *next_streaming = streaming + sizes.band();
  _tile_loadconfig(&kTileShapes);
  for (int64_t line = work.resident_begin; line < work.resident_end; line += sizes.most_lines) {
    const int64_t lines = min(work.resident_end - line, sizes.most_lines), bands = ceil_div(lines, kBand);
    for (int64_t p = 0; p < work.depth; p += sizes.most_depth) {
      const int64_t depth = min(work.depth - p, sizes.most_depth), steps = ceil_div(depth, kTileDepth);
      const auto splitter = [&](int64_t band, bfloat16_pair* to) {
        const int64_t band_lines = max(0, min(work.streaming_end - band, kBand));
        return BandSplitter<streams_a>(work.streaming.from(band, p), band_lines, depth, to);
      };
      const bool resident_is_exact =
          split<!streams_a, is_transposed>(work.resident.from(line, p), lines, depth, resident);
      bool streaming_is_exact = splitter(work.streaming_begin, streaming).finish();
      for (int64_t band = work.streaming_begin; band < work.streaming_end; band += kBand) {
        const int64_t band_lines = min(work.streaming_end - band, kBand);
        const auto part = [&](int64_t of_line, int64_t of_lines) {
          const bool is_first = p == 0, is_last = p + depth == work.depth;
          return streams_a ? SplitPart{band, band_lines, of_line, of_lines, p, depth, is_first, is_last}
                           : SplitPart{of_line, of_lines, band, band_lines, p, depth, is_first, is_last};
        };
        auto next = splitter(band + kBand, next_streaming);
        if (resident_is_exact && streaming_is_exact) {
          const int64_t vectors = ceil_div(next.whole(), bands * steps * kGroupsOfStep);
          for (int64_t i = 0; i < bands; ++i) {
            const bfloat16_pair* const resident_band = resident + i * steps * kStepPairs;
            const SplitPart block = part(line + i * kBand, min(lines - i * kBand, kBand));
            multiply_bands(streams_a ? streaming : resident_band, streams_a ? resident_band : streaming, steps,
                           result.block(block), next, vectors);
            result.finish(block);
          }
        } else {
          result.multiply_floats(part(line, lines));
        }
        streaming_is_exact = next.finish();
        bfloat16_pair* const other = streaming;
        streaming = next_streaming;
        next_streaming = other;
      }
    }
  }
  _tile_release();
}

// --- product: c = a b or a^T b. The longer operand streams, but not a^T. ---

bool streams_a(const Product<float>& self) { return !self.a_transposed && self.rows > self.cols; }

int64_t split_product_tasks(const Product<float>& self) { return split_tasks(self.rows, self.cols); }

int64_t resident_lines(const Product<float>& self) { return streams_a(self) ? self.cols : self.rows; }

int64_t split_product_scratch(const Product<float>& self) {
  return SplitScratch(resident_lines(self), self.depth).size();
}

// c = act(sum + bias), or that of c + sum, of the first count elements.
template <ActivationKind kind>
TORCH_MLP_INLINE void finish_vector(vec sum, vec bias, bool adds, float* c, int64_t count) {
  const vec z = adds ? load_part(c, count) + sum : sum;
  store_part(c, activation<kind>(z + bias), count);
}

// The same of a block; bias may be null.
template <ActivationKind kind>
void finish_block(Matrix block, const float* bias, bool adds, int64_t rows, int64_t cols, Matrix c) {
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int64_t left = min(cols - j, kLanes);
    const vec of_bias = bias ? load_part(bias + j, left) : vec{};
    for (int64_t i = 0; i < rows; ++i) {
      const vec sum = load_part(block.data + i * block.stride + j, left);
      finish_vector<kind>(sum, of_bias, adds, c.data + i * c.stride + j, left);
    }
  }
}

struct SplitProductResult {
  const Product<float>& self;
  Matrix spare_block;
  float* scratch;

  bool adds(const SplitPart& part) const { return self.accumulates || !part.is_first; }
  Matrix c(const SplitPart& part) const { return {self.c.data + part.row * self.c.stride + part.col, self.c.stride}; }
  bool is_in_place(const SplitPart& part) const { return part.rows == kBand && part.cols == kBand && !adds(part); }

  Matrix block(const SplitPart& part) const { return is_in_place(part) ? c(part) : spare_block; }

  void finish(const SplitPart& part) const {
    if (!is_in_place(part)) {
      finish_block<ActivationKind::Identity>(spare_block, nullptr, adds(part), part.rows, part.cols, c(part));
    }
  }

  void multiply_floats(const SplitPart& part) const {
    const Lines a = lines_of(self.a, self.a_transposed).from(part.row, part.p);
    const Product<float> of_floats{part.rows,         part.cols,
                                   part.depth,        {a.data, self.a.stride},
                                   self.a_transposed, {self.b.data + part.p * self.b.stride + part.col, self.b.stride},
                                   c(part),           adds(part)};
    product(of_floats, 0, product_tasks(of_floats), scratch);
  }
};

void split_product(const Product<float>& self, int64_t begin, int64_t end, float* scratch) {
  const Lines a = lines_of(self.a, self.a_transposed), b = lines_of(self.b, true);
  const SplitScratch sizes(resident_lines(self), self.depth);
  const SplitProductResult result{self, {scratch + sizes.block(), kBand}, scratch + sizes.floats()};
  if (streams_a(self)) {
    const SplitWork work(b, self.cols, a, self.rows, self.depth, begin, end);
    multiply_split<true, false>(work, sizes, scratch, result);
  } else {
    const SplitWork work(a, self.rows, b, self.cols, self.depth, begin, end);
    (self.a_transposed ? multiply_split<false, true, SplitProductResult>
                       : multiply_split<false, false, SplitProductResult>)(work, sizes, scratch, result);
  }
}

// --- linear: y = act(x W^T + b) where x streams; else y^T = act(W x^T + b), and W does. The longer one streams. ---

bool streams_x(const LinearShape& shape) { return shape.batch > shape.out_features; }

int64_t split_linear_tasks(const LinearShape& shape) { return split_tasks(shape.batch, shape.out_features); }

int64_t split_linear_scratch(const LinearShape& shape) {
  return SplitScratch(min(shape.batch, shape.out_features), shape.in_features).size();
}

// The same as finish_block, of a block of y^T.
template <ActivationKind kind>
void finish_transposed_block(Matrix block, const float* bias, bool adds, int64_t rows, int64_t cols, Matrix y) {
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int64_t left = min(cols - j, kLanes);
    const vec of_bias = bias ? load_part(bias + j, left) : vec{};
    for (int64_t i = 0; i < rows; i += kLanes) {
      vec square[kLanes];
      load_transposed<true>({block.data + j * block.stride + i, block.stride}, kLanes, kLanes, square);
      TORCH_MLP_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        if (i + l < rows) {
          finish_vector<kind>(square[l], of_bias, adds, y.data + (i + l) * y.stride + j, left);
        }
      }
    }
  }
}

// Of parts of y, or of y^T.
template <bool is_transposed>
struct SplitLinearResult {
  const LinearForward<float>& self;
  Matrix spare_block;
  float* scratch;

  SplitPart of_y(const SplitPart& part) const {
    return is_transposed
               ? SplitPart{part.col, part.cols, part.row, part.rows, part.p, part.depth, part.is_first, part.is_last}
               : part;
  }
  Matrix y(const SplitPart& part) const {
    return {self.output.data + part.row * self.output.stride + part.col, self.output.stride};
  }
  const float* bias(const SplitPart& part) const { return self.bias && part.is_last ? self.bias + part.col : nullptr; }

  Matrix block(const SplitPart&) const { return spare_block; }

  void finish(const SplitPart& part) const {
    const SplitPart to = of_y(part);
    dispatch(to.is_last ? self.activation : ActivationKind::Identity, [&](auto act) {
      (is_transposed ? finish_transposed_block<act.value>
                     : finish_block<act.value>)(spare_block, bias(to), !to.is_first, to.rows, to.cols, y(to));
    });
  }

  void multiply_floats(const SplitPart& part) const {
    SplitPart to = of_y(part);
    for (const int64_t end = to.col + to.cols; to.col < end; to.col += kBand) {
      to.cols = min(end - to.col, kBand);
      pack_transposed<float>({self.weight.data + to.col * self.weight.stride + to.p, self.weight.stride}, to.cols,
                             to.depth, scratch);
      const ConstMatrix x{self.input.data + to.row * self.input.stride + to.p, self.input.stride};
      const ConstMatrix transposed_weight{scratch, ceil_div(to.cols, kLanes) * kLanes};
      const Product<float> of_floats{to.rows, to.cols, to.depth, x, false, transposed_weight, y(to), !to.is_first};
      product(of_floats, 0, product_tasks(of_floats), scratch + kBand * to.depth);
      if (to.is_last) {
        dispatch(self.activation,
                 [&](auto act) { finish_block<act.value>(y(to), bias(to), false, to.rows, to.cols, y(to)); });
      }
    }
  }
};

void split_linear(const LinearForward<float>& self, int64_t begin, int64_t end, float* scratch) {
  const auto& [batch, ins, outs] = self.shape;
  const Lines x = lines_of(self.input, false), w = lines_of(self.weight, false);
  const SplitScratch sizes(min(batch, outs), ins);
  const Matrix spare_block{scratch + sizes.block(), kBand};
  float* const floats = scratch + sizes.floats();
  if (streams_x(self.shape)) {
    multiply_split<true, true>(SplitWork(w, outs, x, batch, ins, begin, end), sizes, scratch,
                               SplitLinearResult<false>{self, spare_block, floats});
  } else {
    multiply_split<true, true>(SplitWork(x, batch, w, outs, ins, begin, end), sizes, scratch,
                               SplitLinearResult<true>{self, spare_block, floats});
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

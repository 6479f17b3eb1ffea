// Products of bands of tiles by the matrix unit, one after the other. For gemm_amx.h.
//
// Of the two operands one is resident: a block of it is brought into tiles beforehand and stays in the second-level
// cache. The other streams past it band by band. While the unit multiplies one band, the next is brought into tiles,
// and the block of sums before is finished: this takes little time of its own, for the unit leaves the vector
// instructions to others, nor has the unit to wake up, which takes a microsecond or two after a pause.
#pragma once

#include "gemm.h"
#include "unit_bands.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// Measured on Emerald Rapids. At most so many lines are resident, and stream past them while their sums are kept:
template <typename T>
constexpr int64_t kResidentLines = std::is_same_v<T, float> ? 320 : 512;
constexpr int64_t kStreamingLines = 1024;
// About so much of the depth at once; in bfloat16 less where both operands lie in rows along it.
template <typename T>
constexpr int64_t kUnitDepth = std::is_same_v<T, float> ? 640 : 1024;
constexpr int64_t kDepthOfRows = 512;

constexpr int64_t kBlock = kBand * kBand;

template <typename T>
constexpr int kGroupsOfStep = kParts<T> == 1 ? 1 : 6;  // of four tiles

// The shapes of the eight tiles, all of them whole.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// In memory throughout: the compiler does not know how much of it is read.
constexpr TileShapes kTileShapes;

// sums (kBand, kBand) = the product of two bands, steps times kTileDepth deep; or sums += it. With every four tiles of
// it, meanwhile() is called. The streaming operand's stay in the first-level cache for the next band of the resident
// one, whose own pass it by.
template <bool streams_a, typename T, typename Meanwhile>
TORCH_MLP_INLINE void multiply_bands(const BandOfA<T>& a, const bfloat16_pair* b, int64_t steps, Matrix sums, bool adds,
                                     Meanwhile&& meanwhile) {
  // Tiles 0 to 3 hold the sums, 4 and 5 a part of a, 6 and 7 one of b.
  const auto load_a = [&](const void* upper, const void* lower, int64_t stride) {
    if constexpr (streams_a) {
      _tile_loadd(4, upper, stride);
      _tile_loadd(5, lower, stride);
    } else {
      _tile_stream_loadd(4, upper, stride);
      _tile_stream_loadd(5, lower, stride);
    }
  };
  const auto load_b = [&](const bfloat16_pair* tiles) {
    if constexpr (streams_a) {
      _tile_stream_loadd(6, tiles, kTileRowBytes);
      _tile_stream_loadd(7, tiles + kTilePairs, kTileRowBytes);
    } else {
      _tile_loadd(6, tiles, kTileRowBytes);
      _tile_loadd(7, tiles + kTilePairs, kTileRowBytes);
    }
  };
  const auto multiply = [&] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    meanwhile();
  };
  const int64_t stride = sums.stride * sizeof(float);
  float* const lower = sums.data + kTileSide * sums.stride;
  asm volatile("" ::: "memory");  // tiles are filled: the compiler does not know that what loads them reads memory
  if (adds) {
    _tile_loadd(0, sums.data, stride);
    _tile_loadd(1, sums.data + kTileSide, stride);
    _tile_loadd(2, lower, stride);
    _tile_loadd(3, lower + kTileSide, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t step = 0;
  if constexpr (kParts<T> == 1) {
    for (; step < a.steps_in_place; ++step) {
      const auto at = [&](int64_t line) { return a.in_place.from(line, step * kTileDepth).data; };
      load_a(at(0), at(kTileSide), a.in_place.line_stride * sizeof(T));
      load_b(b + step * kStepPairs<T>);
      multiply();
    }
  }
  for (; step < steps; ++step) {
    const bfloat16_pair *const of_a = a.tiles + step * kStepPairs<T>, *const of_b = b + step * kStepPairs<T>;
    const auto part_of_a = [&](int part) {
      load_a(of_a + part * kPartPairs, of_a + part * kPartPairs + kTilePairs, kTileRowBytes);
    };
    const auto part_of_b = [&](int part) { load_b(of_b + part * kPartPairs); };
    if constexpr (kParts<T> == 1) {
      part_of_a(0);
      part_of_b(0);
      multiply();
    } else {
      // The small products first; from one to the next, one operand stays.
      part_of_a(2);
      part_of_b(0);
      multiply();
      part_of_a(1);
      multiply();
      part_of_b(1);
      multiply();
      part_of_a(0);
      multiply();
      part_of_b(2);
      multiply();
      part_of_b(0);
      multiply();
    }
  }
  _tile_stored(0, sums.data, stride);
  _tile_stored(1, sums.data + kTileSide, stride);
  _tile_stored(2, lower, stride);
  _tile_stored(3, lower + kTileSide, stride);
}

// The lines of both operands that a thread multiplies, all of the depth.
template <typename T>
struct UnitWork {
  Lines<T> resident, streaming;
  int64_t resident_begin, resident_end, streaming_begin, streaming_end, depth;

  UnitWork(const Lines<T>& resident, int64_t resident_lines, const Lines<T>& streaming, int64_t streaming_lines,
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
int64_t unit_tasks(int64_t resident_lines, int64_t streaming_lines) {
  return ceil_div(max(resident_lines, streaming_lines), kBand);
}

// A part of c and of the depth.
struct UnitPart {
  int64_t row, rows, col, cols, p, depth;
  bool is_first, is_last;  // of the depth
};

// Whether the sums of one part of the depth are added to those of the others in c; else in scratch memory, and c is
// written once.
template <typename Out>
constexpr bool kAddsInC = std::is_same_v<Out, float>;

// What a thread cuts its work into, whole bands and steps, and its scratch memory of floats or pairs: a block of the
// resident operand and two bands of the other, blocks of sums, and what the products by floats need. Where sums are
// added in c, there is room for fewer lines and less depth too, which may be cut into larger parts.
template <typename T, typename Out>
struct UnitScratch {
  int64_t most_lines, most_depth, most_streaming, room_lines, room_depth;
  bool keeps_sums;  // of all blocks, until the last part of the depth

  UnitScratch(int64_t resident_lines, int64_t streaming_lines, int64_t depth, int64_t about = kUnitDepth<T>)
      : most_lines(bands_of(resident_lines, kResidentLines<T>)),
        most_depth(ceil_div(equal_part(depth, about), kTileDepth) * kTileDepth),
        room_lines(min(ceil_div(resident_lines, kBand) * kBand, kResidentLines<T>)),
        room_depth(ceil_div(min(depth, about * 3 / 2), kTileDepth) * kTileDepth),
        keeps_sums(!kAddsInC<Out> && most_depth < depth) {
    most_streaming = bands_of(streaming_lines, keeps_sums ? kStreamingLines : streaming_lines);
  }

  // The lines of whole bands that an equal part of all has, or at most so many.
  static int64_t bands_of(int64_t lines, int64_t most) {
    return ceil_div(ceil_div(lines, ceil_div(lines, most)), kBand) * kBand;
  }

  int64_t band() const { return room_depth / kTileDepth * kStepPairs<T>; }
  int64_t bands() const { return room_lines / kBand * band(); }
  int64_t sums() const { return bands() + 2 * band(); }
  int64_t blocks() const { return keeps_sums ? most_lines / kBand * (most_streaming / kBand) : 1; }
  int64_t turned() const { return sums() + blocks() * kBlock; }
  int64_t floats() const { return turned() + kBlock; }
  int64_t size() const { return floats() + (std::is_same_v<T, float> ? room_depth * (kBand + kPanelCols) : 0); }
};

// The last block of sums, until it is finished: step by step, while the unit multiplies the next, before whose sums are
// stored.
template <typename Result>
class Finisher {
 public:
  explicit Finisher(const Result& result) : result_(result) {}

  void start(const UnitPart& part, Matrix sums) {
    part_ = part;
    sums_ = sums;
    next_ = 0;
    steps_ = result_.steps_to_finish(part);
  }
  TORCH_MLP_INLINE void some(int64_t steps) {
    for (const int64_t end = min(steps_, next_ + steps); next_ < end; ++next_) {
      result_.finish(part_, sums_, next_);
    }
  }
  void rest() { some(steps_); }
  int64_t steps() const { return steps_; }

 private:
  const Result& result_;
  UnitPart part_{};
  Matrix sums_{};
  int64_t next_ = 0, steps_ = 0;
};

// For each part of at most a band of rows and of columns, result.block(part) gets the sums and result.finish(part) is
// called so many times as result.steps_to_finish(part) says; or, where the sums would not be exact,
// result.multiply_floats(part) for all resident lines at once. Whether a streams, or b; whether the resident operand is
// transposed.
template <bool streams_a, bool is_transposed, typename T, typename Out, typename Result>
void multiply_by_unit(const UnitWork<T>& work, const UnitScratch<T, Out>& sizes, float* scratch, const Result& result) {
  auto* const resident = reinterpret_cast<bfloat16_pair*>(scratch);
  bfloat16_pair *streaming = resident + sizes.bands(), *next_streaming = streaming + sizes.band();
  float* const spare_blocks = scratch + sizes.sums();
  Finisher<Result> finisher(result);
  _tile_loadconfig(&kTileShapes);
  for (int64_t first = work.streaming_begin; first < work.streaming_end; first += sizes.most_streaming) {
    const int64_t last = min(work.streaming_end, first + sizes.most_streaming);
    for (int64_t line = work.resident_begin; line < work.resident_end; line += sizes.most_lines) {
      const int64_t lines = min(work.resident_end - line, sizes.most_lines), bands = ceil_div(lines, kBand);
      for (int64_t p = 0; p < work.depth; p += sizes.most_depth) {
        const int64_t depth = min(work.depth - p, sizes.most_depth), steps = ceil_div(depth, kTileDepth);
        const auto lines_of_band = [&](int64_t band) { return max(0, min(last - band, kBand)); };
        const auto filler = [&](int64_t band, bfloat16_pair* to) {
          return BandFiller<streams_a, T>(work.streaming.from(band, p), lines_of_band(band), depth, to);
        };
        const bool resident_is_exact =
            fill_bands<!streams_a, is_transposed>(work.resident.from(line, p), lines, depth, resident);
        bool streaming_is_exact = filler(first, streaming).finish();
        for (int64_t band = first; band < last; band += kBand) {
          const auto part = [&](int64_t of_line, int64_t of_lines) {
            const int64_t band_lines = lines_of_band(band);
            const bool is_first = p == 0, is_last = p + depth == work.depth;
            return streams_a ? UnitPart{band, band_lines, of_line, of_lines, p, depth, is_first, is_last}
                             : UnitPart{of_line, of_lines, band, band_lines, p, depth, is_first, is_last};
          };
          auto next = filler(band + kBand, next_streaming);
          if (resident_is_exact && streaming_is_exact) {
            const int64_t vectors = ceil_div(next.whole(), bands * steps * kGroupsOfStep<T>);
            for (int64_t i = 0; i < bands; ++i) {
              const bfloat16_pair* const resident_band = resident + i * steps * kStepPairs<T>;
              const UnitPart to = part(line + i * kBand, min(lines - i * kBand, kBand));
              const int64_t number = sizes.keeps_sums ? (band - first) / kBand * bands + i : 0;
              float* const spare = spare_blocks + number * kBlock;
              const Matrix sums = result.block(to, {spare, kBand});
              const BandOfA<T> a{streams_a ? streaming : resident_band, work.streaming.from(band, p),
                                 streams_a ? steps_in_place<T>(to.rows, depth) : 0};
              const int64_t finishing = ceil_div(finisher.steps(), steps * kGroupsOfStep<T>);
              multiply_bands<streams_a>(a, streams_a ? resident_band : streaming, steps, sums,
                                        sizes.keeps_sums && !to.is_first, [&] {
                                          finisher.some(finishing);
                                          next.fill_some(vectors);
                                        });
              finisher.start(to, sums);
            }
          } else if constexpr (std::is_same_v<T, float>) {
            finisher.rest();
            result.multiply_floats(part(line, lines));
          }
          streaming_is_exact = next.finish();
          bfloat16_pair* const other = streaming;
          streaming = next_streaming;
          next_streaming = other;
        }
      }
    }
  }
  finisher.rest();
  _tile_release();
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

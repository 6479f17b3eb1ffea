// Operands of products by the matrix unit, in the order in which it wants them: band by band. For level.h.
#pragma once

#include "pair_bfloat16.h"
#include "split_floats.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

// Fills the bands of (lines, depth) of an operand, with zeros up to whole bands and steps. Whether they are exact.
template <bool is_a, bool is_transposed, typename T>
bool fill_bands(const Lines<T>& of, int64_t lines, int64_t depth, bfloat16_pair* to) {
  constexpr bool rows_are_lines = is_a != is_transposed;  // in memory, whose rows are read one after the other
  const int64_t bands = ceil_div(lines, kBand), steps = ceil_div(depth, kTileDepth);
  vec_uint most{};
  for (int64_t i = 0; i < bands * steps; ++i) {
    const int64_t number = rows_are_lines ? i / steps : i % bands, step = rows_are_lines ? i % steps : i / bands;
    const int64_t band = number * kBand, p = step * kTileDepth;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t begin = band + half * kTileSide;
      const Lines<T> tile = of.from(begin, p);
      bfloat16_pair* const to_tile = to + (number * steps + step) * kStepPairs<T> + half * kTilePairs;
      if (lines - begin >= kTileSide && depth - p >= kTileDepth) {
        most = fill_tile<is_a, is_transposed, true>(tile, kTileSide, kTileDepth, to_tile, most);
      } else {
        most = fill_tile<is_a, is_transposed, false>(tile, lines - begin, depth - p, to_tile, most);
      }
    }
  }
  return std::is_same_v<T, bfloat16_bits> || are_exact(most);
}

// The steps of a band of operand a, not transposed, that are read where they lie, for they do so as in tiles.
template <typename T>
TORCH_MLP_INLINE int64_t steps_in_place(int64_t lines, int64_t depth) {
  return std::is_same_v<T, bfloat16_bits> && lines == kBand ? depth / kTileDepth : 0;
}

// Fills a band, whose operand is not transposed, a few of the vectors at a time; not the steps that are read in place.
template <bool is_a, typename T>
class BandFiller {
 public:
  // No lines: nothing to do.
  BandFiller(const Lines<T>& of, int64_t lines, int64_t depth, bfloat16_pair* to)
      : of_(of),
        lines_(lines),
        depth_(depth),
        to_(to),
        whole_depth_(lines == kBand ? depth / kTileDepth * kTileDepth : 0) {}

  // The vectors of a whole step are numbered so that those that lie beside each other in memory come together.
  TORCH_MLP_INLINE void fill_some(int64_t count) {
    for (const int64_t end = min(whole(), next_ + count); next_ < end; ++next_) {
      const int64_t step = next_ / kBand, half = next_ % 2, i = next_ % kBand / 2;
      most_ = fill_vector<is_a>(of_.from(half * kTileSide, step * kTileDepth), i,
                                to_ + step * kStepPairs<T> + half * kTilePairs, most_);
    }
  }

  // The rest. Whether it is exact.
  bool finish() {
    fill_some(whole());
    for (int64_t p = whole_depth_; p < depth_ && lines_ > 0; p += kTileDepth) {
      for (int64_t half = 0; half < 2; ++half) {
        most_ = fill_tile<is_a, false, false>(of_.from(half * kTileSide, p), lines_ - half * kTileSide, depth_ - p,
                                              to_ + p / kTileDepth * kStepPairs<T> + half * kTilePairs, most_);
      }
    }
    return std::is_same_v<T, bfloat16_bits> || are_exact(most_);
  }

  // The vectors of whole steps.
  int64_t whole() const {
    return is_a && steps_in_place<T>(lines_, depth_) > 0 ? 0 : whole_depth_ / kTileDepth * kBand;
  }

 private:
  const Lines<T> of_;
  const int64_t lines_, depth_;
  bfloat16_pair* const to_;
  const int64_t whole_depth_;
  int64_t next_ = 0;
  vec_uint most_{};
};

// A band of operand a: the first steps where they lie in memory, the others in tiles.
template <typename T>
struct BandOfA {
  const bfloat16_pair* tiles;
  Lines<T> in_place;
  int64_t steps_in_place;
};

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

// Matrix products of one row, or of depth one, which take no longer than visiting the matrix. For gemm.h.
#pragma once

#include "tiles.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

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

// c += a b of some rows of b, along which it goes. Their sum is added to c, which has fewer roundings than one after
// the other would.
template <int depth>
void add_rows(Broadcast<float> a, Rows<const float> b, float* c, int64_t cols) {
  const int64_t whole = whole_vectors(cols);
  float element[depth];
  TORCH_MLP_UNROLL
  for (int p = 0; p < depth; ++p) {
    element[p] = a.data[p * a.depth_stride];
  }
  const auto add = [&](int64_t j, auto is_whole) {
    vec sum[depth];
    TORCH_MLP_UNROLL
    for (int p = 0; p < depth; ++p) {
      sum[p] = element[p] * load_some<is_whole.value>(b.data + p * b.stride + j, cols - whole);
    }
    TORCH_MLP_UNROLL
    for (int half = depth / 2; half > 0; half /= 2) {
      TORCH_MLP_UNROLL
      for (int p = 0; p < half; ++p) {
        sum[p] += sum[p + half];
      }
    }
    store_some<is_whole.value>(c + j, load_some<is_whole.value>(c + j, cols - whole) + sum[0], cols - whole);
  };
  for (int64_t j = 0; j < whole; j += kLanes) {
    add(j, std::true_type{});
  }
  if (whole < cols) {
    add(whole, std::false_type{});
  }
}

// c = a b, or c += a b, of one row: nothing but reading b, which goes best along whole rows.
void row_product(Broadcast<float> a, Rows<const float> b, float* c, int64_t depth, int64_t cols, bool accumulates) {
  constexpr int together = 8;
  if (!accumulates) {
    memset(c, 0, cols * sizeof(float));
  }
  int64_t p = 0;
  for (; p + together <= depth; p += together) {
    add_rows<together>({a.data + p * a.depth_stride, 1, a.depth_stride}, {b.data + p * b.stride, b.stride}, c, cols);
  }
  for (; p < depth; ++p) {
    add_rows<1>({a.data + p * a.depth_stride, 1, a.depth_stride}, {b.data + p * b.stride, b.stride}, c, cols);
  }
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

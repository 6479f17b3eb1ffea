// The products of a first layer on images most of whose pixels are 0: only the others cost anything. For level.h.
//
//   forward   z = the sum over the pixels that are not 0 of x_k V_k    V (features, outputs), in panels of columns
//   update    V_k moves by a step of SGD along the sum over the images whose pixel k is not 0 of x_k gz
//
// x_k is looked up by the byte of the pixel. A panel is as wide as the sums that fit the registers. A mask tells which
// of 64 pixels of an image, or of 64 images of a pixel, are not 0.
#pragma once

#include "elementwise.h"
#include "vector.h"

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

constexpr int kMostPanelVectors = 8;
// Rows of V that stay in the first-level cache while kImagesAtOnce images use them.
constexpr int64_t kPixelsAtOnce = 56;
constexpr int64_t kImagesAtOnce = 16;

// Bit l tells whether byte l is not 0, of count bytes, at most 64.
TORCH_MLP_INLINE uint64_t nonzero_bytes(const uint8_t* bytes, int64_t count) {
#if TORCH_MLP_LANES == 16
  const __m512i value = _mm512_maskz_loadu_epi8(count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1, bytes);
  return _mm512_test_epi8_mask(value, value);
#else
  alignas(32) uint8_t copy[64] = {};
  if (count < 64) {
    memcpy(copy, bytes, count);
    bytes = copy;
  }
#if TORCH_MLP_LANES == 8
  const __m256i zero = _mm256_setzero_si256();
  uint64_t zeros = 0;
  for (int half = 0; half < 2; ++half) {
    __m256i value;
    memcpy(&value, bytes + 32 * half, sizeof(value));
    zeros |= uint64_t(uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(value, zero)))) << (32 * half);
  }
  return ~zeros;
#else
  uint64_t mask = 0;
  for (int l = 0; l < 64; ++l) {
    mask |= uint64_t(bytes[l] != 0) << l;
  }
  return mask;
#endif
#endif
}

// Without a loop: where GCC unrolls an inner one, it unrolls the one around it as well.
template <int vectors, size_t... j>
TORCH_MLP_INLINE void add_row(vec factor, const float* row, vec (&sum)[vectors], std::index_sequence<j...>) {
  ((sum[j] += factor * load(row + int64_t(j) * kLanes)), ...);
}

// sum += the rows that mask names, times the values of the bytes.
template <int vectors>
TORCH_MLP_INLINE void add_rows(uint64_t mask, const uint8_t* bytes, const float* values, const float* rows,
                               int64_t stride, vec (&sum)[vectors]) {
  while (mask) {
    const int64_t k = __builtin_ctzll(mask);
    mask &= mask - 1;
    const float* row = rows + k * stride;
    // Else the compiler adds k * stride anew for each vector, and keeps the mask where arithmetic is slow.
    asm("" : "+r"(row), "+r"(mask));
    add_row(broadcast(values[bytes[k]]), row, sum, std::make_index_sequence<vectors>{});
  }
}

template <int vectors>
void pixels_forward_panel(const PixelForward& self) {
  constexpr int64_t width = vectors * kLanes;
  memset(self.z, 0, self.images * width * sizeof(float));
  for (int64_t first = 0; first < self.images; first += kImagesAtOnce) {
    const int64_t last = min(self.images, first + kImagesAtOnce);
    for (int64_t k = 0; k < self.features; k += kPixelsAtOnce) {
      const int64_t pixels = min(kPixelsAtOnce, self.features - k);
      for (int64_t i = first; i < last; ++i) {
        const uint8_t* bytes = self.rows[i] + k;
        const uint64_t mask = nonzero_bytes(bytes, pixels);
        if (mask) {
          float* z = self.z + i * width;
          vec sum[vectors];
          TORCH_MLP_UNROLL
          for (int j = 0; j < vectors; ++j) {
            sum[j] = load(z + j * kLanes);
          }
          add_rows<vectors>(mask, bytes, self.values, self.panel + k * width, width, sum);
          TORCH_MLP_UNROLL
          for (int j = 0; j < vectors; ++j) {
            store(z + j * kLanes, sum[j]);
          }
        }
      }
    }
  }
}

// 64 images at a time, whose rows of grad_z stay in the first-level cache, with the sums of a few pixels.
template <int vectors, bool has_velocity>
void pixels_update_panel(const PixelUpdate& self) {
  constexpr int64_t width = vectors * kLanes;
  const bool is_plain = !has_velocity && self.step.weight_decay == 0;
  alignas(64) float sums[kPixelsAtOnce * width];
  for (int64_t first = 0; first < self.features; first += kPixelsAtOnce) {
    const int64_t last = min(self.features, first + kPixelsAtOnce);
    uint64_t any = 0;  // for each of the pixels, whether it is not 0 in some image
    for (int64_t i = 0; i < self.images; i += 64) {
      for (int64_t k = first; k < last; ++k) {
        const uint8_t* bytes = self.columns + k * self.images + i;
        const uint64_t mask = nonzero_bytes(bytes, 64), pixel = uint64_t(1) << (k - first);
        float *row = self.panel + k * width, *stored = sums + (k - first) * width;
        vec sum[vectors] = {};
        if (any & pixel) {
          TORCH_MLP_UNROLL
          for (int j = 0; j < vectors; ++j) {
            sum[j] = load(stored + j * kLanes);
          }
        }
        any |= mask ? pixel : 0;
        add_rows<vectors>(mask, bytes, self.values, self.grad_z.data + i * self.grad_z.stride, self.grad_z.stride, sum);
        if (i + 64 < self.images) {
          TORCH_MLP_UNROLL
          for (int j = 0; j < vectors; ++j) {
            store(stored + j * kLanes, sum[j]);
          }
        } else if (!is_plain) {
          TORCH_MLP_UNROLL
          for (int j = 0; j < vectors; ++j) {
            sgd_vector<has_velocity>(row + j * kLanes, has_velocity ? self.velocity + k * width + j * kLanes : nullptr,
                                     sum[j], self.step);
          }
        } else if (any & pixel) {
          TORCH_MLP_UNROLL
          for (int j = 0; j < vectors; ++j) {
            store(row + j * kLanes, load(row + j * kLanes) - self.step.lr * sum[j]);
          }
        }
      }
    }
  }
}

// Calls body with the width of a panel as a constant.
template <int vectors = kMostPanelVectors, typename Body>
TORCH_MLP_INLINE void dispatch_width(int64_t width, const Body& body) {
  if (width == vectors * kLanes) {
    body(std::integral_constant<int, vectors>{});
  } else if constexpr (vectors > 1) {
    dispatch_width<vectors - 1>(width, body);
  }
}

void pixels_forward(const PixelForward& self) {
  dispatch_width(self.width, [&](auto vectors) { pixels_forward_panel<vectors.value>(self); });
}

void pixels_update(const PixelUpdate& self) {
  dispatch_width(self.width, [&](auto vectors) {
    self.velocity ? pixels_update_panel<vectors.value, true>(self) : pixels_update_panel<vectors.value, false>(self);
  });
}

constexpr int kByteRows = 4 * kLanes;  // of bytes that are transposed at once: 16 in each quarter of a vector
using vec_bytes = uint8_t __attribute__((vector_size(kByteRows)));

// Lower (first is 0) or upper (8) halves of each 16 bytes of a and b, in turns.
template <int first, size_t... byte>
TORCH_MLP_INLINE vec_bytes interleave(vec_bytes a, vec_bytes b, std::index_sequence<byte...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, int(byte / 16 * 16 + first + byte % 16 / 2 + (byte % 2 ? kByteRows : 0))...);
#else
  return __builtin_shuffle(a, b,
                           vec_bytes{uint8_t(byte / 16 * 16 + first + byte % 16 / 2 + (byte % 2 ? kByteRows : 0))...});
#endif
}

// The 16 bytes from k on, or the first count of them, of each of the rows 0, 16, ...
template <bool is_whole>
TORCH_MLP_INLINE vec_bytes load_rows(const uint8_t* const* rows, int64_t k, int64_t count) {
#if TORCH_MLP_LANES == 16
  const __mmask16 mask = is_whole ? 0xffff : __mmask16((1u << count) - 1);
  __m512i value = _mm512_zextsi128_si512(_mm_maskz_loadu_epi8(mask, rows[0] + k));
  value = _mm512_inserti64x2(value, _mm_maskz_loadu_epi8(mask, rows[16] + k), 1);
  value = _mm512_inserti64x2(value, _mm_maskz_loadu_epi8(mask, rows[32] + k), 2);
  return (vec_bytes)_mm512_inserti64x2(value, _mm_maskz_loadu_epi8(mask, rows[48] + k), 3);
#else
  uint8_t bytes[kByteRows] = {};
  for (int q = 0; q < kByteRows / 16; ++q) {
    memcpy(bytes + 16 * q, rows[16 * q] + k, is_whole ? 16 : count);
  }
  vec_bytes value;
  memcpy(&value, bytes, sizeof(value));
  return value;
#endif
}

template <bool is_whole>
TORCH_MLP_INLINE void transpose_square(const uint8_t* const* rows, int64_t k, int64_t count, uint8_t* columns,
                                       int64_t stride) {
  constexpr auto bytes = std::make_index_sequence<kByteRows>{};
  vec_bytes square[16];
  TORCH_MLP_UNROLL
  for (int l = 0; l < 16; ++l) {
    square[l] = load_rows<is_whole>(rows + l, k, count);
  }
  // Each round interleaves the halves; after four of them rows have become columns.
  TORCH_MLP_UNROLL
  for (int round = 0; round < 4; ++round) {
    vec_bytes halves[16];
    TORCH_MLP_UNROLL
    for (int l = 0; l < 8; ++l) {
      halves[2 * l] = interleave<0>(square[l], square[l + 8], bytes);
      halves[2 * l + 1] = interleave<8>(square[l], square[l + 8], bytes);
    }
    TORCH_MLP_UNROLL
    for (int l = 0; l < 16; ++l) {
      square[l] = halves[l];
    }
  }
  TORCH_MLP_UNROLL
  for (int l = 0; l < 16; ++l) {
    if (is_whole || l < count) {
      memcpy(columns + (k + l) * stride, &square[l], sizeof(vec_bytes));
    }
  }
}

// columns[k * stride + i] = rows[i][k], for 64 rows.
void transpose_bytes(const uint8_t* const* rows, int64_t features, uint8_t* columns, int64_t stride) {
  const int64_t whole = features / 16 * 16;
  for (int64_t i = 0; i < 64; i += kByteRows) {
    for (int64_t k = 0; k < whole; k += 16) {
      transpose_square<true>(rows + i, k, 16, columns + i, stride);
    }
    if (whole < features) {
      transpose_square<false>(rows + i, whole, features - whole, columns + i, stride);
    }
  }
}

// The rows of a panel (depth, width), each plus row, as columns of w (count, depth): what pack_transposed makes,
// undone.
void unpack_panel(const float* panel, int64_t width, const float* row, int64_t depth, Matrix w, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const vec of_row = load(row + j);
    for (int64_t k = 0; k < depth; k += kLanes) {
      vec square[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        square[l] = k + l < depth ? load(panel + (k + l) * width + j) + of_row : vec{};
      }
      transpose(square);
      for (int64_t l = 0; l < min(kLanes, count - j); ++l) {
        store_part(w.data + (j + l) * w.stride + k, square[l], min(kLanes, depth - k));
      }
    }
  }
}

// y[i, j] = activation(z[i, j] + row_factor[i] * row[j] + offset[j]) of matrices (rows, cols) with cols a multiple of
// kLanes, z contiguous.
void finish_pixels(ActivationKind kind, const float* z, const float* row_factor, const float* row, const float* offset,
                   Matrix y, int64_t rows, int64_t cols) {
  dispatch(kind, [&](auto act) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += kLanes) {
        const vec value = load(z + i * cols + j) + (row_factor[i] * load(row + j) + load(offset + j));
        store(y.data + i * y.stride + j, activation<act.value>(value));
      }
    }
  });
}

int64_t sum_of_bytes(const uint8_t* bytes, int64_t count) {
  int64_t sum = 0, k = 0;
#if TORCH_MLP_LANES == 16
  __m512i sums = _mm512_setzero_si512();
  for (; k < count; k += 64) {
    const __mmask64 mask = count - k >= 64 ? ~uint64_t(0) : (uint64_t(1) << (count - k)) - 1;
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(mask, bytes + k), _mm512_setzero_si512()));
  }
  sum = _mm512_reduce_add_epi64(sums);
#endif
  for (; k < count; ++k) {
    sum += bytes[k];
  }
  return sum;
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

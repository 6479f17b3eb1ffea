// Vectors of floats in the compiler's own vector types: loads and stores, sums, a transpose. exp.h computes with them.
//
// What arithmetic operators and ?: do element by element is left to the compiler; intrinsics are used only where it has
// no word for an instruction. For level.h; see kernels.h for why nothing of the standard library is called here but
// memcpy.
#pragma once

namespace torch_mlp::TORCH_MLP_LEVEL {
namespace {

constexpr int kLanes = TORCH_MLP_LANES;

using vec = float __attribute__((vector_size(4 * kLanes)));
using vec_int = int32_t __attribute__((vector_size(4 * kLanes)));
using vec_short = uint16_t __attribute__((vector_size(2 * kLanes)));
using vec_uint = uint32_t __attribute__((vector_size(4 * kLanes)));

#define TORCH_MLP_INLINE inline __attribute__((always_inline))
// Loops over registers have to vanish, else the array of them lives in memory.
#define TORCH_MLP_UNROLL _Pragma("GCC unroll 32")

// Elements of a and b, numbered through both.
#if defined(__clang__)
#define TORCH_MLP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TORCH_MLP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vec_int{__VA_ARGS__})  // GCC 11 has no other
#endif

// x - 0 and not 0 + x, which would turn -0 into 0 and cost an instruction.
TORCH_MLP_INLINE vec broadcast(float x) { return x - vec{}; }

TORCH_MLP_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
TORCH_MLP_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
TORCH_MLP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- loads and stores; the part_ ones touch only the first count elements and fill up with zeros ---

TORCH_MLP_INLINE vec load(const float* from) {
  vec value;
  memcpy(&value, from, sizeof(value));
  return value;
}

TORCH_MLP_INLINE void store(float* to, vec value) { memcpy(to, &value, sizeof(value)); }

TORCH_MLP_INLINE vec load_part(const float* from, int64_t count) {
#if TORCH_MLP_LANES == 16
  return (vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#elif TORCH_MLP_LANES == 8
  return (vec)_mm256_maskload_ps(from, (__m256i)(vec_int{0, 1, 2, 3, 4, 5, 6, 7} < int32_t(count)));
#else
  float values[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) {
    values[l] = from[l];
  }
  return load(values);
#endif
}

constexpr bool kStoresPartsAtOnce = kLanes == 16;  // else in a loop

TORCH_MLP_INLINE void store_part(float* to, vec value, int64_t count) {
#if TORCH_MLP_LANES == 16
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)value);
#else
  float values[kLanes];
  store(values, value);
  for (int64_t l = 0; l < count; ++l) {
    to[l] = values[l];
  }
#endif
}

// The compilers convert in halves where the processor does it at once.
TORCH_MLP_INLINE vec widen(vec_short bits) {
#if TORCH_MLP_LANES == 16
  return (vec)((vec_uint)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits) << 16);
#else
  return (vec)(__builtin_convertvector(bits, vec_uint) << 16);
#endif
}

// As bfloat16 in the upper half of each lane, the lower half being anything: rounded to nearest, ties to even; NaN
// stays NaN.
TORCH_MLP_INLINE vec_uint round_to_bfloat16(vec value) {
  const vec_uint bits = (vec_uint)value;
  return value != value ? vec_uint{} + 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
}

TORCH_MLP_INLINE vec_short narrow(vec value) {
  const vec_uint result = round_to_bfloat16(value) >> 16;
#if TORCH_MLP_LANES == 16
  return (vec_short)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)result);
#else
  return __builtin_convertvector(result, vec_short);
#endif
}

TORCH_MLP_INLINE vec load(const bfloat16_bits* from) {
  vec_short bits;
  memcpy(&bits, from, sizeof(bits));
  return widen(bits);
}

TORCH_MLP_INLINE void store(bfloat16_bits* to, vec value) {
  const vec_short bits = narrow(value);
  memcpy(to, &bits, sizeof(bits));
}

// The same, but that subnormal numbers may become 0: it saves most of the instructions where the processor has one.
TORCH_MLP_INLINE void store_flushed(bfloat16_bits* to, vec value) {
#if defined(TORCH_MLP_HAS_BFLOAT16_DOTS)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
  store(to, value);
#endif
}

TORCH_MLP_INLINE void store_flushed(float* to, vec value) { store(to, value); }

TORCH_MLP_INLINE vec load_part(const bfloat16_bits* from, int64_t count) {
#if TORCH_MLP_LANES == 16
  return widen((vec_short)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from));
#else
  bfloat16_bits values[kLanes] = {};
  memcpy(values, from, count * sizeof(bfloat16_bits));
  return load(values);
#endif
}

TORCH_MLP_INLINE void store_part(bfloat16_bits* to, vec value, int64_t count) {
#if TORCH_MLP_LANES == 16
  _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), (__m256i)narrow(value));
#else
  bfloat16_bits values[kLanes];
  store(values, value);
  memcpy(to, values, count * sizeof(bfloat16_bits));
#endif
}

// Pairs are moved about in the bits of a vec.
TORCH_MLP_INLINE vec load(const bfloat16_pair* from) { return load(reinterpret_cast<const float*>(from)); }
TORCH_MLP_INLINE void store(bfloat16_pair* to, vec value) { store(reinterpret_cast<float*>(to), value); }
TORCH_MLP_INLINE vec load_part(const bfloat16_pair* from, int64_t count) {
  return load_part(reinterpret_cast<const float*>(from), count);
}
TORCH_MLP_INLINE void store_part(bfloat16_pair* to, vec value, int64_t count) {
  store_part(reinterpret_cast<float*>(to), value, count);
}
// Of numbers that are bfloat16.
TORCH_MLP_INLINE vec exact_pairs_of(vec first, vec second) { return (vec)((vec_uint)first >> 16 | (vec_uint)second); }
TORCH_MLP_INLINE vec broadcast(bfloat16_pair x) { return (vec)(vec_uint{} + x.bits); }

// sum + a b, of bfloat16_pairs the products of both, where the processor has an instruction for them.
template <typename T>
TORCH_MLP_INLINE vec multiply_add(vec a, vec b, vec sum) {
  if constexpr (std::is_same_v<T, float>) {
    return sum + a * b;
#if defined(TORCH_MLP_HAS_BFLOAT16_DOTS)
  } else {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  }
}

TORCH_MLP_INLINE float to_float(float value) { return value; }

TORCH_MLP_INLINE float to_float(bfloat16_bits value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

// A whole vector, or the first count elements of one.
template <bool is_whole, typename T>
TORCH_MLP_INLINE vec load_some(const T* from, int64_t count) {
  return is_whole ? load(from) : load_part(from, count);
}

template <bool is_whole, typename T>
TORCH_MLP_INLINE void store_some(T* to, vec value, int64_t count) {
  is_whole ? store(to, value) : store_part(to, value, count);
}

// How many of count elements fill whole vectors.
TORCH_MLP_INLINE int64_t whole_vectors(int64_t count) { return count / kLanes * kLanes; }

// --- sums and the transpose ---

// Lane l of the results is a's or b's, in turns of distance lanes: low takes a's and b's lower halves, high the upper.
template <int distance, size_t... lane>
TORCH_MLP_INLINE void exchange(vec& a, vec& b, std::index_sequence<lane...>) {
  const vec low = TORCH_MLP_SHUFFLE(a, b, int(lane & distance ? lane - distance + kLanes : lane)...);
  const vec high = TORCH_MLP_SHUFFLE(a, b, int(lane & distance ? lane + kLanes : lane + distance)...);
  a = low;
  b = high;
}

// The square of kLanes vectors, transposed.
template <int distance = 1>
TORCH_MLP_INLINE void transpose(vec (&rows)[kLanes]) {
  if constexpr (distance < kLanes) {
    TORCH_MLP_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & distance)) {
        exchange<distance>(rows[i], rows[i + distance], std::make_index_sequence<kLanes>{});
      }
    }
    transpose<2 * distance>(rows);
  }
}

// Lane l of the result is the sum over the lanes of values[l].
template <int count = kLanes>
TORCH_MLP_INLINE vec sums_of(vec (&values)[kLanes]) {
  if constexpr (count == 1) {
    return values[0];
  } else {
    TORCH_MLP_UNROLL
    for (int i = 0; i < count / 2; ++i) {
      exchange<count / 2>(values[i], values[i + count / 2], std::make_index_sequence<kLanes>{});
      values[i] += values[i + count / 2];
    }
    return sums_of<count / 2>(values);
  }
}

// Lane l of the result is lane at[l] of value.
TORCH_MLP_INLINE vec permute(vec value, vec_int at) {
#if TORCH_MLP_LANES == 16
  return (vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)at, (__m512)value);
#elif TORCH_MLP_LANES == 8
  return (vec)_mm256_permutevar8x32_ps((__m256)value, (__m256i)at);
#else
  vec result;
  for (int l = 0; l < kLanes; ++l) {
    result[l] = value[at[l]];
  }
  return result;
#endif
}

TORCH_MLP_INLINE vec_int permute(vec_int value, vec_int at) { return (vec_int)permute((vec)value, at); }

// Half as many lanes.
constexpr int kHalfLanes = kLanes / 2;
using vec_half = float __attribute__((vector_size(4 * kHalfLanes)));
using vec_half_int = int32_t __attribute__((vector_size(4 * kHalfLanes)));
using vec_double = double __attribute__((vector_size(8 * kHalfLanes)));
using vec_long = int64_t __attribute__((vector_size(8 * kHalfLanes)));

// The compilers convert in quarters what the processor does in halves.
TORCH_MLP_INLINE vec_double to_double(vec_half value) {
#if TORCH_MLP_LANES == 16
  return (vec_double)_mm512_maskz_cvtps_pd(0xff, (__m256)value);
#elif TORCH_MLP_LANES == 8
  return (vec_double)_mm256_cvtps_pd((__m128)value);
#else
  return __builtin_convertvector(value, vec_double);
#endif
}

// The halves of a vector as doubles, and back.
TORCH_MLP_INLINE void to_double(vec value, vec_double (&halves)[2]) {
  vec_half parts[2];
  memcpy(parts, &value, sizeof(value));
  halves[0] = to_double(parts[0]);
  halves[1] = to_double(parts[1]);
}

TORCH_MLP_INLINE vec to_float(const vec_double (&halves)[2]) {
  const vec_half parts[2] = {__builtin_convertvector(halves[0], vec_half),
                             __builtin_convertvector(halves[1], vec_half)};
  vec value;
  memcpy(&value, parts, sizeof(value));
  return value;
}

// The sums of float values in double: over a long batch the digits that float drops would add up.
struct DoubleSum {
  vec_double low{}, high{};

  TORCH_MLP_INLINE void add(vec value) {
    vec_double halves[2];
    to_double(value, halves);
    low += halves[0];
    high += halves[1];
  }

  TORCH_MLP_INLINE double total() const {
    double sums[kLanes / 2];
    const vec_double both = low + high;
    memcpy(sums, &both, sizeof(both));
    TORCH_MLP_UNROLL
    for (int half = kLanes / 4; half > 0; half /= 2) {  // in pairs: the additions of a chain would wait for each other
      TORCH_MLP_UNROLL
      for (int l = 0; l < half; ++l) {
        sums[l] += sums[l + half];
      }
    }
    return sums[0];
  }

  TORCH_MLP_INLINE void add_to(double* sums, int64_t count) const {
    double values[kLanes];
    memcpy(values, &low, sizeof(low));
    memcpy(values + kLanes / 2, &high, sizeof(high));
    for (int64_t l = 0; l < count; ++l) {
      sums[l] += values[l];
    }
  }
};

// The larger of both; b where one is NaN.
TORCH_MLP_INLINE vec maximum_of(vec a, vec b) {
  // One instruction, where ?: becomes two.
#if TORCH_MLP_LANES == 16
  return (vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif TORCH_MLP_LANES == 8
  return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

TORCH_MLP_INLINE float maximum_of(vec value) {
  float most[kLanes];
  store(most, value);
  TORCH_MLP_UNROLL
  for (int half = kLanes / 2; half > 0; half /= 2) {
    TORCH_MLP_UNROLL
    for (int l = 0; l < half; ++l) {
      most[l] = most[l + half] > most[l] ? most[l + half] : most[l];
    }
  }
  return most[0];
}

// The first count lanes of value, and other's after them.
TORCH_MLP_INLINE vec first_lanes(vec value, int64_t count, vec other) {
  vec_int lane;
  TORCH_MLP_UNROLL
  for (int l = 0; l < kLanes; ++l) {
    lane[l] = l;
  }
  return lane < int32_t(count) ? value : other;
}

}  // namespace
}  // namespace torch_mlp::TORCH_MLP_LEVEL

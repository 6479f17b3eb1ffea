// Products of edge shapes by every level that the processor has, cut in every way that kernels.cpp may choose on
// another one, for test_sanitizers.py to compile with a sanitizer: in memory of just the size that the kernels ask for,
// and of small integers, whose sums have no rounding errors. Prints "multiplied" if every element is right.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/amx.h"
#include "../../csrc/cpu/kernels.h"

namespace torch_mlp {
namespace {

Tuning chosen;
std::mt19937 generator(1);

float small_integer() { return float(int(generator() % 5) - 2); }

bfloat16_bits in_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {uint16_t(bits >> 16)};
}

float in_float(bfloat16_bits value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// One or two values of a matrix, as the kernels store them, and their product.
void draw(float& to) { to = small_integer(); }
void draw(bfloat16_bits& to) { to = in_bfloat16(small_integer()); }
void draw(bfloat16_pair& to) {
  to.bits = in_bfloat16(small_integer()).bits | uint32_t(in_bfloat16(small_integer()).bits) << 16;
}
float times(float a, float b) { return a * b; }
float times(bfloat16_bits a, bfloat16_bits b) { return in_float(a) * in_float(b); }
float times(bfloat16_pair a, bfloat16_pair b) {
  return times(bfloat16_bits{uint16_t(a.bits)}, bfloat16_bits{uint16_t(b.bits)}) +
         times(bfloat16_bits{uint16_t(a.bits >> 16)}, bfloat16_bits{uint16_t(b.bits >> 16)});
}
// A sum as it is stored: of so many bfloat16 it may not be exact, but is rounded once.
bool is_sum(float stored, float sum) { return stored == sum; }
bool is_sum(bfloat16_bits stored, float sum) {
  return in_float(stored) - sum <= 0.00390625f * std::abs(sum) && sum - in_float(stored) <= 0.00390625f * std::abs(sum);
}

template <typename T>
std::vector<T> drawn(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) {
    draw(value);
  }
  return values;
}

struct Sizes {
  int64_t rows, cols, depth;
};

// Both halves of the tasks, each with scratch memory of its own.
template <typename T, typename Run>
void run_in_halves(int64_t tasks, int64_t scratch, const Run& run) {
  for (const auto& [begin, end] : {std::pair{int64_t(0), tasks / 2}, {tasks / 2, tasks}}) {
    std::vector<T> memory(scratch);
    run(begin, end, memory.data());
  }
}

// c (+)= a b or a^T b, by the functions of a table
template <typename ProductOf, typename T, typename Out, typename Table>
bool multiplies(const Table& table, const Sizes& sizes, bool a_transposed, bool accumulates) {
  const auto& [rows, cols, depth] = sizes;
  const std::vector<T> a = drawn<T>(rows * depth), b = drawn<T>(depth * cols);
  std::vector<Out> c = drawn<Out>(rows * cols);
  const std::vector<Out> before = c;
  ProductOf product{
      rows, cols, depth, {a.data(), a_transposed ? rows : depth}, a_transposed, {b.data(), cols}, {c.data(), cols}};
  if constexpr (std::is_same_v<Out, float>) {
    product.accumulates = accumulates;
  }
  run_in_halves<T>(table.product_tasks(product), table.product_scratch(product),
                   [&](int64_t begin, int64_t end, T* scratch) { table.product(product, begin, end, scratch); });
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      float sum = 0;
      if constexpr (std::is_same_v<Out, float>) {
        sum = accumulates ? before[i * cols + j] : 0;
      }
      for (int64_t p = 0; p < depth; ++p) {
        sum += times(a[a_transposed ? p * rows + i : i * depth + p], b[p * cols + j]);
      }
      if (!is_sum(c[i * cols + j], sum)) {
        return false;
      }
    }
  }
  return true;
}

// y = x W^T + bias, with x (rows, depth) and W (cols, depth)
template <typename T, typename Out>
bool maps(const ProductKernels<T, Out>& table, const Sizes& sizes) {
  const auto& [rows, cols, depth] = sizes;
  const std::vector<T> x = drawn<T>(rows * depth), w = drawn<T>(cols * depth);
  const std::vector<float> bias = drawn<float>(cols);
  std::vector<Out> y(rows * cols);
  const LinearForward<T, Out> forward{{rows, depth, cols}, {x.data(), depth}, {w.data(), depth},
                                      bias.data(),         {y.data(), cols},  ActivationKind::Identity};
  run_in_halves<T>(table.linear_tasks(forward.shape), table.linear_scratch(forward.shape),
                   [&](int64_t begin, int64_t end, T* scratch) { table.linear(forward, begin, end, scratch); });
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      float sum = bias[j];
      for (int64_t p = 0; p < depth; ++p) {
        sum += times(x[i * depth + p], w[j * depth + p]);
      }
      if (!is_sum(y[i * cols + j], sum)) {
        return false;
      }
    }
  }
  return true;
}

bool is_right(const Kernels& kernels, const Sizes& sizes) {
  const bool has_unit = kernels.unit_float.product, has_pairs = kernels.products_bfloat16.product;
  for (const bool a_transposed : {false, true}) {
    for (const bool accumulates : {false, true}) {
      if (!multiplies<Product<float>, float, float>(kernels.products_float, sizes, a_transposed, accumulates) ||
          (has_unit &&
           (!multiplies<Product<float>, float, float>(kernels.unit_float, sizes, a_transposed, accumulates) ||
            !multiplies<Product<bfloat16_bits>, bfloat16_bits, float>(kernels.unit_into_float, sizes, a_transposed,
                                                                      accumulates))) ||
          (has_pairs && !multiplies<Product<bfloat16_pair>, bfloat16_pair, float>(kernels.products_bfloat16, sizes,
                                                                                  a_transposed, accumulates))) {
        return false;
      }
    }
    const auto multiplies_bfloat16 = [&](const auto& table) {
      return !table.product ||
             multiplies<Bfloat16Product, bfloat16_bits, bfloat16_bits>(table, sizes, a_transposed, false);
    };
    if (!multiplies_bfloat16(kernels.into_bfloat16) || !multiplies_bfloat16(kernels.unit_bfloat16)) {
      return false;
    }
  }
  return maps(kernels.products_float, sizes) && (!has_pairs || maps(kernels.products_bfloat16, sizes)) &&
         (!has_unit || (maps(kernels.unit_float, sizes) && maps(kernels.unit_bfloat16, sizes) &&
                        maps(kernels.unit_into_float, sizes)));
}

std::vector<const Kernels*> levels() {
  std::vector<const Kernels*> result{&level_default::kernels};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    result.push_back(&level_avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      result.push_back(&level_avx512::kernels);
      if (__builtin_cpu_supports("avx512bf16")) {
        result.push_back(&level_avx512_bf16::kernels);
        if (has_amx()) {
          result.push_back(&level_amx::kernels);
        }
      }
    }
  }
#endif
  return result;
}

}  // namespace

const Tuning& tuning() { return chosen; }  // in place of that of kernels.cpp

}  // namespace torch_mlp

int main() {
  using namespace torch_mlp;
  // Rows and columns around the tiles' sizes; rows that are worth copying for, half pages and whole ones apart; depths
  // of one part and of several.
  const Sizes shapes[] = {{1, 17, 300},  {1, 1024, 130}, {2, 64, 1},     {5, 33, 7},     {7, 100, 40},
                          {10, 64, 20},  {11, 64, 130},  {12, 512, 65},  {13, 1, 300},   {23, 15, 3},
                          {66, 512, 40}, {70, 1024, 9},  {300, 130, 3},  {257, 512, 40}, {260, 96, 420},
                          {13, 40, 800}, {400, 64, 70},  {40, 33, 1000}, {33, 20, 1700}, {17, 1200, 900}};
  for (const Tuning& cut : {Tuning{256, 1 << 16, false, true}, Tuning{128, 0, true, false}}) {
    chosen = cut;
    for (const Kernels* kernels : levels()) {
      for (const Sizes& sizes : shapes) {
        if (!is_right(*kernels, sizes)) {
          std::printf("a product of %d rows, %d columns, depth %d by %s, cut at %d, is wrong\n", int(sizes.rows),
                      int(sizes.cols), int(sizes.depth), kernels->name, int(cut.depth));
          return 1;
        }
      }
    }
  }
  std::puts("multiplied");
}

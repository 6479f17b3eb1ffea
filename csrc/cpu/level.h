// One instruction set's kernels: included once by each level_*.cpp, which says which.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

// Below the headers above, and only there, the compiler may use the instructions of the level.
#ifdef TORCH_MLP_TARGET
#define TORCH_MLP_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define TORCH_MLP_PUSH_TARGET(names) \
  TORCH_MLP_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#else
#define TORCH_MLP_PUSH_TARGET(names) TORCH_MLP_PRAGMA(GCC target(names))
#endif
TORCH_MLP_PUSH_TARGET(TORCH_MLP_TARGET)
#endif

#include "elementwise.h"
#include "gemm.h"
#if defined(TORCH_MLP_HAS_BFLOAT16_DOTS)
#include "gemm_bfloat16.h"
#endif
#if defined(TORCH_MLP_HAS_AMX)
#include "gemm_amx.h"
#endif
#include "logistic.h"
#include "peak.h"
#include "pixels.h"
#include "softmax.h"

namespace torch_mlp::TORCH_MLP_LEVEL {

#if defined(TORCH_MLP_HAS_AMX)
template <typename T, typename Out>
constexpr ProductKernels<T, Out> unit_products{
    unit_linear_tasks,          unit_linear_scratch<T, Out>,  unit_linear<T, Out>,
    unit_product_tasks<T, Out>, unit_product_scratch<T, Out>, unit_product<T, Out>};
#endif

const Kernels kernels{
    TORCH_MLP_LEVEL_NAME,
    kLanes,
    {linear_tasks<float>, linear_scratch<float>, linear<float, float>, product_tasks<float>, product_scratch<float>,
     product<float>},
#if defined(TORCH_MLP_HAS_AMX)
    unit_products<float, float>,
    unit_products<bfloat16_bits, bfloat16_bits>,
    unit_products<bfloat16_bits, float>,
#else
    {},
    {},
    {},
#endif
#if defined(TORCH_MLP_HAS_BFLOAT16_DOTS)
    {linear_tasks<bfloat16_pair>, linear_scratch<bfloat16_pair>, linear<bfloat16_pair, float>,
     product_tasks<bfloat16_pair>, product_scratch<bfloat16_pair>, product<bfloat16_pair>},
    {linear<bfloat16_pair, bfloat16_bits>, bfloat16_product_tasks, bfloat16_product_scratch, bfloat16_product},
    pair_columns,
    pair_rows,
#else
    {},
    {},
    nullptr,
    nullptr,
#endif
    {activate<float>, activation_backward<float>},
    {activate<bfloat16_bits>, activation_backward<bfloat16_bits>},
    {statistics<float>, deficit<float>, gradient<float>, statistics_and_gradient<float>},
    {statistics<bfloat16_bits>, deficit<bfloat16_bits>, gradient<bfloat16_bits>,
     statistics_and_gradient<bfloat16_bits>},
    labels,
    losses,
    {logistic_loss<float>, logistic_gradient<float>},
    {logistic_loss<bfloat16_bits>, logistic_gradient<bfloat16_bits>},
    {kMostPanelVectors * kLanes, pack_transposed<float>, unpack_panel, transpose_bytes, sum_of_bytes, pixels_forward,
     finish_pixels, pixels_update},
    normalize<uint8_t>,
    normalize<float>,
    sgd,
    multiply_adds,
    kMultiplyAddsOfRound,
#if defined(TORCH_MLP_HAS_AMX)
    split_multiply_adds,
    kSplitMultiplyAddsOfRound,
#else
    nullptr,
    0,
#endif
};

}  // namespace torch_mlp::TORCH_MLP_LEVEL

#if defined(TORCH_MLP_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif

// The softmax of a row of logits on CUDA, which the cross-entropy ops share.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "common.cuh"

namespace torch_mlp {
namespace {

// The blocks that a multiprocessor has to hold at once of the kernels that visit every logit. Left to itself, the
// compiler would save so many registers for more of them that it spills.
template <typename scalar_t>
constexpr int kMinBlocks = std::is_same_v<scalar_t, double> ? 2 : 4;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// exp(x - maximum) of a row is computed as exp(x - shift_of(maximum)): the elements of a row of -inf, and the NaN among
// them, stay what they are.
template <typename compute>
__device__ compute shift_of(compute maximum) {
  return maximum == -kInfinity<compute> ? compute(0) : maximum;
}

// exp of what is at most 0. In 16 bits the processor's own approximation is far more exact than the result.
template <typename scalar_t, typename compute = compute_t<scalar_t>>
__device__ compute exp_of(compute x) {
  if constexpr (sizeof(scalar_t) == 2) {
    return __expf(x);
  } else {
    return std::exp(x);
  }
}

// By halves: fewer roundings follow each other than one after another.
template <int count, typename compute>
__device__ compute tree_sum(compute (&values)[count]) {
#pragma unroll
  for (int half = count / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) {
      values[j] += values[j + half];
    }
  }
  return values[0];
}

// The maximum m of a row, and sum_c exp(x_c - m). A row that holds NaN or +inf, or nothing but -inf, has NaN for the
// latter, and so for loss and gradient, as in torch; one of no classes has -inf and 0.
template <int lanes, typename scalar_t, typename compute = compute_t<scalar_t>>
__device__ void row_softmax(const scalar_t* x, int64_t phase, int64_t classes, int lane, compute& maximum,
                            compute& sum) {
  compute running = -kInfinity<compute>, partial = 0;
  for_each_pack<scalar_t>(phase, classes, lane, lanes, [&](auto at) {
    const auto pack = load(x, at);
    compute grown = running;
#pragma unroll
    for (const auto& value : pack.values) {
      grown = std::fmax(grown, compute(value));
    }
    const compute shift = shift_of(grown);
    compute exps[at.width];
#pragma unroll
    for (int j = 0; j < at.width; ++j) {
      exps[j] = exp_of<scalar_t>(compute(pack.values[j]) - shift);
    }
    partial = partial * exp_of<scalar_t>(running - shift) + tree_sum(exps);
    running = grown;
  });
  maximum = lanes_reduce<lanes>(running, Max{});
  // In double: of many threads' rounded sums, the error would be in all gradients of the row.
  const double total = lanes_reduce<lanes>(double(partial * exp_of<scalar_t>(running - shift_of(maximum))), Add{});
  sum = maximum == -kInfinity<compute> && classes > 0 ? kNaN<compute> : compute(total);
}

}  // namespace
}  // namespace torch_mlp

// What the vector kernels run on, for torch_mlp.show_config and scripts/bench.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <string>

#include "kernels.h"

namespace torch_mlp {
namespace {

std::string cpu_capability() { return kernels().name; }

// Floating-point operations of so many rounds on each thread.
int64_t count_operations(float (*multiply_adds)(int64_t), int64_t of_round, int64_t threads, int64_t rounds) {
  std::atomic<float> keep{0};  // so that the results count as used
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      keep = multiply_adds(rounds);
    }
  });
  return 2 * threads * rounds * of_round;
}

int64_t cpu_multiply_adds(int64_t threads, int64_t rounds) {
  return count_operations(kernels().multiply_adds, kernels().multiply_adds_of_round, threads, rounds);
}

int64_t cpu_split_multiply_adds(int64_t threads, int64_t rounds) {
  const Kernels& table = kernels();
  return table.split_multiply_adds
             ? count_operations(table.split_multiply_adds, table.split_multiply_adds_of_round, threads, rounds)
             : 0;
}

}  // namespace
}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&torch_mlp::cpu_capability));
  m.impl("_cpu_multiply_adds", TORCH_BOX(&torch_mlp::cpu_multiply_adds));
  m.impl("_cpu_split_multiply_adds", TORCH_BOX(&torch_mlp::cpu_split_multiply_adds));
}

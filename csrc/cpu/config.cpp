// What the vector kernels run on, for torch_mlp.show_config and scripts/bench.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <string>

#include "kernels.h"

namespace torch_mlp {
namespace {

std::string cpu_capability() { return kernels().name; }

int64_t cpu_multiply_adds(int64_t threads, int64_t rounds) {
  std::atomic<float> keep{0};  // so that the results count as used
  const Kernels& table = kernels();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      keep = table.multiply_adds(rounds);
    }
  });
  return 2 * threads * rounds * table.multiply_adds_of_round;
}

}  // namespace
}  // namespace torch_mlp

STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&torch_mlp::cpu_capability));
  m.impl("_cpu_multiply_adds", TORCH_BOX(&torch_mlp::cpu_multiply_adds));
}

// Which table of vector kernels this process uses.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#include "../checks.h"
#include "amx.h"

namespace torch_mlp {
namespace {

struct Level {
  const Kernels* kernels;
  bool is_supported;
};

// The level that the environment asks for, null if none.
const char* forced_level() {
  const char* name = std::getenv("TORCH_MLP_CPU_CAPABILITY");
  return name && *name ? name : nullptr;
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

const Kernels& choose() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  // The best one comes last.
  const Level levels[] = {
      {&level_default::kernels, true},
#if defined(__x86_64__)
      {&level_avx2::kernels, has_avx2},        {&level_avx512::kernels, has_avx512},
      {&level_avx512_bf16::kernels, has_bf16}, {&level_amx::kernels, has_bf16 && has_amx()},
#endif
  };
  const char* wanted = forced_level();
  const Kernels* best = nullptr;
  std::string names;
  for (const Level& level : levels) {
    if (level.is_supported) {
      names += (names.empty() ? "" : ", ") + std::string(level.kernels->name);
      if (!wanted || std::strcmp(wanted, level.kernels->name) == 0) {
        best = level.kernels;
      }
    }
  }
  check(best != nullptr, "torch_mlp: expected TORCH_MLP_CPU_CAPABILITY to be one of ", names,
        " on this processor, got '", wanted ? wanted : "", "'");
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Tuning& tuning() {
  // Measured on AMD Zen 4 with AVX-512 and Zen 3 with AVX2, and on Intel Emerald Rapids with AVX-512. Intel's
  // first-level cache holds a panel of 128 rows and gets its lines from the second at half of the speed; and lines that
  // are fetched to be written keep it from those that it reads.
  static const Tuning chosen = is_intel() ? Tuning{128, 0, true, false} : Tuning{256, 1 << 16, false, true};
  return chosen;
}

Products faster_products() {
  static const Products faster = [] {
    if (forced_level()) {
      return Products::Kernels;
    }
    if (&kernels() == &level_default::kernels) {
      return Products::Library;
    }
    return is_intel() ? Products::KernelsIfSmall : Products::Kernels;
  }();
  return faster;
}

}  // namespace torch_mlp

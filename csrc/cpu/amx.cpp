// See amx.h. The unit is tried in a child process, for some virtual machines announce it and then kill who uses it.
#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <vector>

#include "kernels.h"

namespace torch_mlp {
namespace {

bool processor_has_amx() {
  constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;  // of leaf 7, register edx
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bfloat16) && (d & tiles);
}

// Linux wants to be asked, for a thread's state grows by 8 KiB; it refuses if the stacks of signal handlers are short.
bool system_gives_amx() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// In the child, which ends here; whether the product is right is for tests to say.
[[noreturn]] void multiply_and_exit(const Product<float>& product, float* scratch, char* survived) {
  for (const int signal : {SIGILL, SIGSEGV, SIGBUS, SIGFPE}) {
    std::signal(signal, [](int) { _exit(1); });  // for the child alone; quietly, without a core dump
  }
  level_amx::kernels.unit_float.product(product, 0, 1, scratch);
  *survived = 1;
  _exit(0);
}

// Whether it lives to say so in memory that both processes see; vfork copies none and lets this one wait.
bool child_survives() {
  void* const shared = mmap(nullptr, 1, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) {
    return false;
  }
  const float one = 1;
  float result = 0;
  const Product<float> product{1, 1, 1, {&one, 1}, false, {&one, 1}, {&result, 1}};
  std::vector<float> scratch(level_amx::kernels.unit_float.product_scratch(product));
  const pid_t child = vfork();
  if (child == 0) {
    multiply_and_exit(product, scratch.data(), static_cast<char*>(shared));
  }
  while (child > 0 && waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  const bool survives = *static_cast<const char*>(shared) == 1;
  munmap(shared, 1);
  return survives;
}

}  // namespace

bool has_amx() { return processor_has_amx() && system_gives_amx() && child_survives(); }

}  // namespace torch_mlp

#else

namespace torch_mlp {

bool has_amx() { return false; }

}  // namespace torch_mlp

#endif

// See amx.h. The unit is tried in a child process, for some virtual machines announce it and then kill who uses it.
#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

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

struct Trial {
  Product<float> product;
  float* scratch;
};

int run_in_child(void* trial) {
  for (const int signal : {SIGILL, SIGSEGV, SIGBUS, SIGFPE}) {
    std::signal(signal, [](int) { _exit(1); });  // for the child alone; quietly, without a core dump
  }
  const auto& [product, scratch] = *static_cast<const Trial*>(trial);
  level_amx::kernels.products_split.product(product, 0, 1, scratch);
  return 0;
}

// Multiplies 2 by 3. The child shares the memory of this process, which waits meanwhile and gets no signal at its end.
bool child_multiplies() {
  const float two = 2, three = 3;
  float six = 0;
  const Product<float> product{1, 1, 1, {&two, 1}, false, {&three, 1}, {&six, 1}};
  std::vector<float> scratch(level_amx::kernels.products_split.product_scratch(product));
  Trial trial{product, scratch.data()};
  std::vector<char> stack(256 << 10);
  const pid_t child = clone(run_in_child, stack.data() + stack.size(), CLONE_VM | CLONE_VFORK, &trial);
  int status = -1;
  return child > 0 && waitpid(child, &status, __WALL) == child && status == 0 && six == 6;
}

}  // namespace

bool has_amx() { return processor_has_amx() && system_gives_amx() && child_multiplies(); }

}  // namespace torch_mlp

#else

namespace torch_mlp {

bool has_amx() { return false; }

}  // namespace torch_mlp

#endif

// What csrc/cpu/amx.cpp makes of a child process that is killed or ends, for test_matrix_unit.py to compile: in place
// of the products by AMX stands one that does so. Prints "tried" if only the one that multiplies passes.
#include <unistd.h>

#include <csignal>
#include <cstdio>

#include "../../csrc/cpu/amx.cpp"

namespace torch_mlp::level_amx {
namespace {

enum class Child { UsesAnUnknownInstruction, IsKilled, ReadsNoMemory, Ends, Multiplies };
Child child;

int64_t no_scratch(const Product<float>&) { return 1; }

void product(const Product<float>& self, int64_t, int64_t, float*) {
  switch (child) {
    case Child::UsesAnUnknownInstruction:
      std::raise(SIGILL);
      return;
    case Child::IsKilled:
      std::raise(SIGKILL);
      return;
    case Child::ReadsNoMemory:
      std::raise(SIGSEGV);
      return;
    case Child::Ends:
      _exit(0);
    case Child::Multiplies:
      *self.c.data = *self.a.data * *self.b.data;
      return;
  }
}

Kernels with_products() {
  Kernels table{};
  table.unit_float.product_scratch = no_scratch;
  table.unit_float.product = product;
  return table;
}

}  // namespace

const Kernels kernels = with_products();

}  // namespace torch_mlp::level_amx

int main() {
  using torch_mlp::level_amx::Child;
  for (const Child one :
       {Child::UsesAnUnknownInstruction, Child::IsKilled, Child::ReadsNoMemory, Child::Ends, Child::Multiplies}) {
    torch_mlp::level_amx::child = one;
    if (torch_mlp::has_amx() != (one == Child::Multiplies)) {
      std::printf("child %d is taken for another\n", int(one));
      return 1;
    }
  }
  std::puts("tried");
}

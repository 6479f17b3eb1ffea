// Memory that a thread keeps from call to call, so that the ops allocate nothing but their results.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace torch_mlp {

// What a thread keeps for one purpose, at most. Work that needs more takes another way.
constexpr int64_t kMaxScratchBytes = 4 << 20;

// The purposes.
struct Panel;         // operands as the vector kernels want them
struct GradZ;         // between the two halves of a backward pass
struct GradBiasSums;  // partial sums

// At least count elements on a 64-byte boundary, with any content, valid until this thread asks for this Purpose again.
template <typename Purpose, typename T>
T* scratch(int64_t count) {
  constexpr std::align_val_t line{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete[](memory, line); }
  };
  thread_local std::unique_ptr<T[], Free> memory;
  thread_local int64_t capacity = 0;
  if (count > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<T*>(::operator new[](count * sizeof(T), line)));
    capacity = count;
  }
  return memory.get();
}

// Asks the system for large pages; one that has none ignores the wish.
inline void prefer_large_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), first = (begin + page - 1) / page * page;
  if (begin + bytes > first) {
    madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / page * page, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace torch_mlp

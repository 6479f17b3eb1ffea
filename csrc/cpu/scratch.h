// Memory that a thread keeps from call to call, so that the ops allocate nothing but their results, and memory for one
// long call.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace torch_mlp {

// What a thread keeps for one purpose, at most. Work that needs more takes another way.
constexpr int64_t kMaxScratchBytes = 4 << 20;

// The purposes.
struct Panel;         // operands as the vector kernels want them
struct BiasInFloat;   // the same of a bias in bfloat16
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

// Zeroed memory on 64-byte boundaries in large pages: the weights are visited in an order in which pages of 4 KiB,
// wherever the system puts them, would crowd each other out of the caches.
class Arena {
 public:
  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = whole(std::max<int64_t>(1, count) * int64_t(sizeof(T)), kLine);
    if (bytes > left_) {
      left_ = whole(std::max(bytes, kBlock), kLargePage);
      blocks_.emplace_back(static_cast<char*>(::operator new(left_, std::align_val_t(kLargePage))));
      next_ = blocks_.back().get();
      prefer_large_pages(next_, left_);
      std::memset(next_, 0, left_);
    }
    left_ -= bytes;
    return reinterpret_cast<T*>(std::exchange(next_, next_ + bytes));
  }

 private:
  static int64_t whole(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

  static constexpr int64_t kLine = 64, kLargePage = 2 << 20, kBlock = 2 * kLargePage;
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(kLargePage)); }
  };
  std::vector<std::unique_ptr<char, Free>> blocks_;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace torch_mlp

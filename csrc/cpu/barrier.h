// Where threads that run at the same time wait for each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace torch_mlp {

// On a machine that is shared the processor may have been taken from one of them: then the others must not spin for
// long.
class Barrier {
 public:
  explicit Barrier(int64_t threads) : threads_(threads) {}

  void wait() {
    if (threads_ == 1) {
      return;
    }
    const int64_t turn = turn_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
    } else {
      for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
        if (spins < 4000) {
#if defined(__x86_64__)
          __builtin_ia32_pause();
#endif
        } else {
          std::this_thread::yield();
        }
      }
    }
  }

 private:
  int64_t threads_;
  alignas(64) std::atomic<int64_t> waiting_{0};
  alignas(64) std::atomic<int64_t> turn_{0};
};

}  // namespace torch_mlp

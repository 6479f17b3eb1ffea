// Small epochs of every kind, with one to four threads, for test_sanitizers.py to compile with a sanitizer: networks of
// one to four layers, few and many classes, images with and without zeros, products of bfloat16, with momentum and
// without. Prints "trained" if every loss is finite, and memory for a minibatch does for a shorter one.
#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <utility>
#include <vector>

#include "../../csrc/cpu/trainer.h"

namespace {

using namespace torch_mlp;

constexpr int64_t kImages = 200, kFeatures = 61, kBatchSize = 31, kSteps = 7;  // the last minibatch is short

struct Case {
  std::vector<int64_t> widths;
  bool has_zeros, bfloat16;
  double momentum;
};

bool trains(const Case& self, int64_t threads, std::mt19937& random) {
  std::vector<uint8_t> bytes(kImages * kFeatures);
  for (uint8_t& byte : bytes) {
    byte = self.has_zeros && random() % 5 ? 0 : uint8_t(1 + random() % 255);
  }
  std::vector<int64_t> labels, order;
  for (int64_t i = 0; i < kImages; ++i) {
    labels.push_back(random() % self.widths.back());
    order.push_back(random() % kImages);
  }
  std::vector<std::vector<float>> memory;  // moving a vector does not move its elements
  const auto numbers = [&](int64_t count) {
    std::vector<float>& values = memory.emplace_back(count);
    for (float& value : values) {
      value = 1e-4f * float(int(random() % 2000) - 1000);
    }
    return values.data();
  };
  std::vector<Layer> layers;
  for (size_t l = 0; l + 1 < self.widths.size(); ++l) {
    const int64_t ins = self.widths[l], outs = self.widths[l + 1];
    const auto parameter = [&](int64_t count) {
      return Parameter{numbers(count), self.momentum == 0 ? nullptr : numbers(count)};
    };
    const bool is_last = l + 2 == self.widths.size();
    layers.push_back(
        {ins, outs, is_last ? ActivationKind::Identity : ActivationKind::Tanh, parameter(ins * outs), parameter(outs)});
  }
  const std::vector<double> rates(kSteps, 0.1);
  std::vector<double> losses(kSteps);
  const Images images{bytes.data(), nullptr, labels.data(), order.data(), kImages, 1.0 / 255, -0.1};
  const Options options{kBatchSize, rates.data(), self.momentum, 0.0, self.has_zeros, self.bfloat16};
  Trainer(layers, images, options, threads).run(losses.data());
  for (const double loss : losses) {
    if (!std::isfinite(loss)) {
      return false;
    }
  }
  return true;
}

// Whether products need no more memory the shorter they are, or the fewer rows they have; how many parts they are cut
// into depends on that.
template <typename T>
bool is_enough_for_shorter(const ProductKernels<T>& table) {
  const auto of_size = [&](int64_t size) {
    const auto scratch = [&](int64_t rows, int64_t depth, bool a_transposed) {
      return table.product_scratch({rows, 100, depth, {}, a_transposed, {}, {}});
    };
    return std::array{scratch(100, size, false), scratch(100, size, true), scratch(size, 100, false),
                      scratch(size, 100, true), table.linear_scratch({size, 100, 2000})};
  };
  for (int64_t size = 2; size < 2000; ++size) {
    const auto shorter = of_size(size - 1), longer = of_size(size);
    for (size_t i = 0; i < shorter.size(); ++i) {
      if (longer[i] < shorter[i]) {
        std::printf("a product %d long needs less memory than one %d long\n", int(size), int(size) - 1);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  const bool has_pairs = kernels().products_bfloat16.product;
  if (!is_enough_for_shorter(kernels().products_float) ||
      (has_pairs && !is_enough_for_shorter(kernels().products_bfloat16)) ||
      (has_unit() && !is_enough_for_shorter(kernels().unit_into_float))) {
    return 1;
  }
  const std::vector<std::vector<int64_t>> networks{
      {61, 10}, {61, 100}, {61, 33, 10}, {61, 40, 30, 10}, {61, 20, 30, 20, 100}, {61, 5, 7}};
  std::mt19937 random(1);
  for (int64_t threads = 1; threads <= 4; ++threads) {
    for (const auto& widths : networks) {
      for (const auto& [has_zeros, bfloat16] : {std::pair{true, false}, {false, false}, {false, true}}) {
        for (const double momentum : {0.0, 0.9}) {
          if (!trains({widths, has_zeros, bfloat16 && has_pairs, momentum}, threads, random)) {
            std::printf("a loss is not finite with %d threads\n", int(threads));
            return 1;
          }
        }
      }
    }
  }
  std::puts("trained");
}

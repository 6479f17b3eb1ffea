// How many parts of size b cover a.
#pragma once

#include <cstdint>

namespace torch_mlp {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace torch_mlp

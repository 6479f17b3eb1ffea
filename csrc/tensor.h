// The few tensor operations that the kernels share: new tensors, views, matrix products, and the choice of a C++ type.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#ifdef TORCH_MLP_WITH_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "ceil_div.h"
#include "checks.h"

namespace torch_mlp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type in which values of scalar_t are computed.
template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// A new tensor on the device of `like`.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) {
    strides[d] = stride;
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle result;
  // Half the time of torch::stable::new_empty, which goes through the dispatcher's boxed calls.
  check(!aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), int32_t(dtype), device_type,
                                  device_index, &result),
        "torch_mlp: expected memory for a result of shape ", shape_of(sizes), ", got none: not enough memory");
  return Tensor(result);
}

inline std::vector<int64_t> sizes_of(const Tensor& self) { return {self.sizes().begin(), self.sizes().end()}; }

// The tensor itself where it is contiguous, which torch::stable::contiguous finds out through the dispatcher.
inline Tensor as_contiguous(const Tensor& self) {
  return self.is_contiguous() ? self : torch::stable::contiguous(self);
}

// A view of (rows, cols) elements that begins `offset` elements after the first one of self.
inline Tensor matrix_view(const Tensor& self, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                          int64_t offset = 0) {
  const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(self.get(), 2, sizes.data(), strides.data(), offset, &view));
  return Tensor(view);
}

// (*, cols) as (rows, cols): a view where the layout allows it, else a copy.
inline Tensor as_matrix(const Tensor& self) {
  if (self.dim() == 2) {
    return self;
  }
  const int64_t cols = self.size(self.dim() - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < self.dim(); ++d) {
    rows *= self.size(d);
  }
  return matrix_view(as_contiguous(self), rows, cols, cols, 1);
}

inline Tensor transpose(const Tensor& self) {
  return matrix_view(self, self.size(1), self.size(0), self.stride(1), self.stride(0));
}

inline Tensor rows_of(const Tensor& self, int64_t begin, int64_t end) {
  return matrix_view(self, end - begin, self.size(1), self.stride(0), self.stride(1), begin * self.stride(0));
}

inline Tensor columns_of(const Tensor& self, int64_t begin, int64_t end) {
  return matrix_view(self, self.size(0), end - begin, self.stride(0), self.stride(1), begin * self.stride(1));
}

// The library says why on stderr; its error codes carry no message.
inline void check_product(AOTITorchError error) {
  check(error == AOTI_TORCH_SUCCESS, "torch_mlp: torch's matrix product failed, as torch.mm would");
}

// out = a @ b (+ bias, one value per column, or a matrix, which may be out itself), by the library's GEMM.
inline void matmul_out(const Tensor& out, const Tensor& a, const Tensor& b,
                       const std::optional<Tensor>& bias = std::nullopt) {
#ifdef TORCH_MLP_WITH_CUDA
  if (out.is_cuda()) {
    check_product(bias ? aoti_torch_cuda_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0)
                       : aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
    return;
  }
#endif
  check_product(bias ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0)
                     : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// Calls body with a value of the C++ type that stores a floating-point dtype; check_floating has been called.
template <typename Body>
void dispatch_floating(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      return body(torch::headeronly::Half{});
  }
}

}  // namespace torch_mlp

// The first layer of a network on uint8 images most of whose pixels are 0, which works on the others only.
//
// Its weight is kept as W^T = V + 1 u, u a row that is added to each row of V, in panels of columns (pixels.h). Then
// the pixels need no shift: with S the sum of the rows of W^T,
//
//   z = scale * sum over the pixels that are not 0 of byte * V + (scale * sum of the bytes) u + shift * S + b
//
// and of the gradient of W^T, scale * bytes^T gz + shift * 1 gb with gb the sum of gz over the images, the first term
// moves V and the second u. V, u and S each move by a step of SGD of their own, with momentum and weight decay, for
// both are linear.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "dense_layer.h"

namespace torch_mlp {

// Its methods take the columns of a panel, and the width to which they are filled up.
class PixelLayer {
 public:
  PixelLayer(const Layer& layer, double scale, double shift, Arena& arena)
      : layer_(layer), kernels_(kernels().pixels), shift_(shift), values_(arena.take<float>(256)) {
    const int64_t width = ceil_div(layer.outs, kernels().lanes) * kernels().lanes;
    const auto take = [&](int64_t count) {
      return Parameter{arena.take<float>(count), layer.weight.velocity ? arena.take<float>(count) : nullptr};
    };
    panels_ = take(layer.ins * width);
    row_ = take(width);
    sum_ = take(width);
    for (int64_t byte = 0; byte < 256; ++byte) {
      values_[byte] = float(double(byte) * scale);
    }
  }

  // From the weight, and back to it.
  void take(Range cols) {
    const auto take = [&](const float* weight, float* panels, float* sums) {
      const float* from = weight + cols.begin * layer_.ins;
      kernels_.pack({from, layer_.ins}, cols.size(), layer_.ins, panels + cols.begin * layer_.ins);
      for (int64_t j = 0; j < cols.size(); ++j) {
        sums[cols.begin + j] = float(std::accumulate(from + j * layer_.ins, from + (j + 1) * layer_.ins, 0.0));
      }
    };
    take(layer_.weight.value, panels_.value, sum_.value);
    if (panels_.velocity) {
      take(layer_.weight.velocity, panels_.velocity, sum_.velocity);
    }
  }

  void give(Range cols, int64_t width) const {
    const auto give = [&](const float* panels, const float* row, float* weight) {
      kernels_.unpack(panels + cols.begin * layer_.ins, width, row + cols.begin, layer_.ins,
                      {weight + cols.begin * layer_.ins, layer_.ins}, cols.size());
    };
    give(panels_.value, row_.value, layer_.weight.value);
    if (panels_.velocity) {
      give(panels_.velocity, row_.velocity, layer_.weight.velocity);
    }
  }

  // The outputs of the layer. sums: of each image's bytes times scale; z: memory for (images, width).
  void forward(const uint8_t* const* images, const float* sums, int64_t count, Range cols, int64_t width, Matrix output,
               float* z, float* offset) const {
    for (int64_t j = 0; j < cols.size(); ++j) {
      const float bias = layer_.bias.value ? layer_.bias.value[cols.begin + j] : 0;
      offset[j] = float(shift_) * sum_.value[cols.begin + j] + bias;
    }
    kernels_.forward({images, count, layer_.ins, values_, panels_.value + cols.begin * layer_.ins, width, z});
    kernels_.finish(layer_.activation, z, sums, row_.value + cols.begin, offset, output, count, width);
  }

  // A step of SGD. columns: the transposed images; grad_sums: of grad_z over the images; weighted_sums: the same, each
  // image times its sum; gradient: memory for a row.
  void move(const uint8_t* columns, int64_t count, ConstMatrix grad_z, const double* grad_sums,
            const float* weighted_sums, Range cols, int64_t width, const SgdStep& step, float* gradient) const {
    const Parameter panel = panels_.from(cols.begin * layer_.ins);
    kernels_.update({columns, count, layer_.ins, values_, panel.value, panel.velocity, width, grad_z, step});
    const int64_t size = cols.size();
    std::transform(grad_sums, grad_sums + size, gradient, [&](double sum) { return float(shift_ * sum); });
    torch_mlp::move(row_.from(cols.begin), gradient, size, step);
    for (int64_t j = 0; j < size; ++j) {
      gradient[j] = weighted_sums[j] + float(double(layer_.ins) * shift_ * grad_sums[j]);
    }
    torch_mlp::move(sum_.from(cols.begin), gradient, size, step);
  }

 private:
  const Layer& layer_;
  const PixelKernels& kernels_;
  double shift_;
  float* values_;                 // of the 256 bytes
  Parameter panels_, row_, sum_;  // V, u, S
};

}  // namespace torch_mlp

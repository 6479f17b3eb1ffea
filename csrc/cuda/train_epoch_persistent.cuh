// All minibatches of a call of _train_epoch in one kernel, for small float32 networks, where a step of single kernels
// is mostly the time between them. The blocks stay, and meet at a barrier of the whole grid between the phases of a
// step; x_0 is the input and x_l the output of layer l, of L:
//
//   forward   x_l = act(x_{l-1} W_l^T + b_l)                     for each layer; x_L are the logits
//   softmax   g_L = (softmax(x_L) - onehot(target)) / batch * act'(x_L)
//   backward  g_{l-1} = (g_l W_l) * act'(x_{l-1})                for l = L, ..., 2
//   update    of all layers: step of SGD of W_l by g_l^T x_{l-1} and of b_l by g_l^T 1; the next minibatch's input
//
// Shapes: x_l and g_l (batch, outs_l), W_l (outs_l, ins_l), b_l (outs_l,), images (N, features), labels (N,), order
// (samples,). Threads: a block for each tile of a product, dealt in turn; 16 elements of the tile for a thread, and as
// many groups of threads as then remain split the sum. A warp for each row of the softmax and image of the input. What
// follows what is fixed by the shapes and the number of blocks, so that sums have the same bits in every run.
#pragma once

#include <cmath>

#include "../train_steps.h"
#include "common.cuh"
#include "tiles.cuh"

namespace torch_mlp {
namespace {

enum class Act { Identity, Sigmoid, Tanh, ReLU };

// Calls body(Activation{}).
template <typename Body>
__device__ float with_activation(Act act, const Body& body) {
  switch (act) {
    case Act::Sigmoid:
      return body(Sigmoid{});
    case Act::Tanh:
      return body(Tanh{});
    case Act::ReLU:
      return body(ReLU{});
    default:
      return body(Identity{});
  }
}

// A parameter and its velocity; each null where there is none.
struct Parameter {
  float *value, *velocity;
};

struct Layer {
  Parameter weight, bias;
  float *output, *grad;  // x and g
  int64_t ins, outs;
  Act act;
  int forward_tile, backward_tile, update_tile;  // of kTiles; backward is of the gradient of this layer's input
};

// The kernel's argument. Of inputs and targets there are two, this minibatch's and the next one's.
struct Epoch {
  Layer layers[kMaxPersistentLayers];
  int64_t layer_count;
  const void* images;
  const int64_t *labels, *order;
  int64_t image_count, features, samples, batch_size, most;  // most: the largest minibatch
  float scale, shift, lr, momentum, weight_decay;
  bool has_whole_rows;  // a tile of the logits has all classes
  bool is_packed;       // images are read by four pixels
  const double* rates;  // of each minibatch; or null, for lr
  float *inputs, *one;
  int64_t* targets;
  double *row_losses, *losses;
  unsigned long long* arrived;
};

// Waits for all blocks; what they wrote before is seen behind it. expected: their arrivals so far, kept by thread 0.
__device__ void grid_barrier(unsigned long long* arrived, unsigned long long& expected) {
  __syncthreads();
  if (threadIdx.x == 0) {
    expected += gridDim.x;
    __threadfence();
    atomicAdd(arrived, 1ull);
    unsigned long long now;
    do {
      asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(now) : "l"(arrived) : "memory");
    } while (now < expected);
  }
  __syncthreads();
}

// --- the phases ---

struct Forward {
  using Loaded = float;
  const Layer& layer;

  __device__ float load(int64_t, int64_t col) const { return layer.bias.value ? __ldcg(layer.bias.value + col) : 0.0f; }
  __device__ void take(int64_t row, int64_t col, float sum, float bias) const {
    const float y = with_activation(layer.act, [&](auto act) { return act.forward(sum + bias); });
    layer.output[row * layer.outs + col] = y;
  }
};

// before: the layer whose output the gradient is of.
struct Backward {
  using Loaded = float;
  const Layer& before;

  __device__ float load(int64_t row, int64_t col) const { return __ldcg(before.output + row * before.outs + col); }
  __device__ void take(int64_t row, int64_t col, float sum, float y) const {
    const float grad = with_activation(before.act, [&](auto act) { return act.backward(sum, y); });
    before.grad[row * before.outs + col] = grad;
  }
};

struct Update {
  struct Loaded {
    float value, velocity;
  };
  const Layer& layer;
  float lr, momentum, weight_decay;

  __device__ const Parameter& parameter(int64_t col) const { return col < layer.ins ? layer.weight : layer.bias; }
  __device__ int64_t at(int64_t row, int64_t col) const { return col < layer.ins ? row * layer.ins + col : row; }
  __device__ Loaded load(int64_t row, int64_t col) const {
    const Parameter& self = parameter(col);
    return {__ldcg(self.value + at(row, col)), self.velocity ? __ldcg(self.velocity + at(row, col)) : 0.0f};
  }
  __device__ void take(int64_t row, int64_t col, float gradient, Loaded loaded) const {
    const Parameter& self = parameter(col);
    sgd_step(loaded.value, self.velocity ? &loaded.velocity : nullptr, gradient, lr, momentum, weight_decay);
    self.value[at(row, col)] = loaded.value;
    if (self.velocity) {
      self.velocity[at(row, col)] = loaded.velocity;
    }
  }
};

// A warp: the loss of a row of logits, and the gradient with respect to what the last layer's activation was taken of.
// A row that holds NaN or +inf, or nothing but -inf, has a loss of NaN, as in torch.
__device__ __noinline__ void softmax_row(const Epoch& epoch, const Layer& layer, const int64_t* targets, int64_t row,
                                         int64_t batch) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  const int64_t classes = layer.outs, target = targets[row];
  CUDA_KERNEL_ASSERT(target >= 0 && target < classes && "expected labels in [0, num_classes)");
  const float* const x = layer.output + row * classes;
  float maximum = x[0], sum = 0;
#pragma unroll 1
  for (int64_t c = lane; c < classes; c += kWarpThreads) {
    maximum = std::fmax(maximum, x[c]);
  }
  maximum = warp_reduce<kWarpThreads>(maximum, Max{});
#pragma unroll 1
  for (int64_t c = lane; c < classes; c += kWarpThreads) {
    sum += std::exp(x[c] - maximum);
  }
  sum = warp_reduce<kWarpThreads>(sum, Add{});
  const float factor = 1 / float(batch);
#pragma unroll 1
  for (int64_t c = lane; c < classes; c += kWarpThreads) {
    const float y = x[c], grad = (std::exp(y - maximum) / sum - (c == target ? 1.0f : 0.0f)) * factor;
    layer.grad[row * classes + c] = with_activation(layer.act, [&](auto act) { return act.backward(grad, y); });
  }
  if (lane == 0) {
    epoch.row_losses[row] = double(std::log(sum)) - (double(x[target]) - double(maximum));
  }
}

// A warp: input = scale * image + shift, by `width` pixels; many are on their way at once, for they come from afar.
template <int width, typename pixel_t>
__device__ void gather_row(const Epoch& epoch, const pixel_t* image, float* input) {
  constexpr int unroll = 8;
  const int64_t packs = epoch.features / width;
  for (int64_t first = threadIdx.x % kWarpThreads; first < packs; first += unroll * kWarpThreads) {
    Pack<pixel_t, width> pixels[unroll];
#pragma unroll
    for (int n = 0; n < unroll; ++n) {
      if (first + n * kWarpThreads < packs) {
        pixels[n] = load(image, PackIndex<width>{0, first + n * kWarpThreads});
      }
    }
#pragma unroll
    for (int n = 0; n < unroll; ++n) {
      if (first + n * kWarpThreads < packs) {
        Pack<float, width> values;
#pragma unroll
        for (int i = 0; i < width; ++i) {
          values.values[i] = epoch.scale * float(pixels[n].values[i]) + epoch.shift;
        }
        store(input, PackIndex<width>{0, first + n * kWarpThreads}, values);
      }
    }
  }
}

// The minibatch of that number, by the blocks from number `first` on.
template <typename pixel_t>
__device__ void gather(const Epoch& epoch, int64_t step, int64_t batch, int64_t first) {
  constexpr int64_t warps = kThreads / kWarpThreads;
  float* const inputs = epoch.inputs + step % 2 * epoch.most * epoch.features;
  int64_t* const targets = epoch.targets + step % 2 * epoch.most;
  const int64_t warp = (int64_t(blockIdx.x) - first) * warps + threadIdx.x / kWarpThreads;
  for (int64_t i = warp; warp >= 0 && i < batch; i += (int64_t(gridDim.x) - first) * warps) {
    const int64_t image = epoch.order[step * epoch.batch_size + i];
    CUDA_KERNEL_ASSERT(image >= 0 && image < epoch.image_count && "expected order in [0, N)");
    const pixel_t* const pixels = static_cast<const pixel_t*>(epoch.images) + image * epoch.features;
    if (epoch.is_packed) {
      gather_row<kPackWidth<float>>(epoch, pixels, inputs + i * epoch.features);
    } else {
      gather_row<1>(epoch, pixels, inputs + i * epoch.features);
    }
    if (threadIdx.x % kWarpThreads == 0) {
      targets[i] = epoch.labels[image];
    }
  }
}

template <typename pixel_t>
__global__ void __launch_bounds__(kThreads) train_kernel(const __grid_constant__ Epoch epoch) {
  alignas(kAccessBytes) __shared__ float shared[kSharedFloats];
  constexpr int64_t warps = kThreads / kWarpThreads;
  const int64_t blocks = gridDim.x, layers = epoch.layer_count, steps = ceil_div(epoch.samples, epoch.batch_size);
  const int warp = int(threadIdx.x) / kWarpThreads;
  const auto batch_of = [&](int64_t step) {
    const int64_t left = epoch.samples - step * epoch.batch_size;
    return left < epoch.batch_size ? left : epoch.batch_size;
  };
  const auto nothing = [](int64_t, int64_t) {};
  unsigned long long arrivals = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *epoch.one = 1;
  }
  gather<pixel_t>(epoch, 0, batch_of(0), 0);
  grid_barrier(epoch.arrived, arrivals);

  for (int64_t step = 0; step < steps; ++step) {
    const int64_t batch = batch_of(step);
    const float* const input = epoch.inputs + step % 2 * epoch.most * epoch.features;
    const int64_t* const targets = epoch.targets + step % 2 * epoch.most;
    const auto input_of = [&](int64_t l) { return l ? epoch.layers[l - 1].output : input; };
    const Layer& last = epoch.layers[layers - 1];

    for (int64_t l = 0; l < layers; ++l) {
      const Layer& layer = epoch.layers[l];
      const Operand<false> x{input_of(l), batch, layer.ins}, weight{layer.weight.value, layer.outs, layer.ins};
      product(shared, layer.forward_tile, x, weight, layer.ins, Forward{layer}, 0, [&](int64_t first, int64_t rows) {
        if (l == layers - 1 && epoch.has_whole_rows) {
          __syncthreads();  // the block has written these rows
          for (int64_t row = first + warp; row < first + rows && row < batch; row += warps) {
            softmax_row(epoch, last, targets, row, batch);
          }
        }
      });
      grid_barrier(epoch.arrived, arrivals);
    }
    if (!epoch.has_whole_rows) {
      for (int64_t row = int64_t(blockIdx.x) * warps + warp; row < batch; row += blocks * warps) {
        softmax_row(epoch, last, targets, row, batch);
      }
      grid_barrier(epoch.arrived, arrivals);
    }

    for (int64_t l = layers - 1; l > 0; --l) {
      const Layer& layer = epoch.layers[l];
      const Operand<false> grad{layer.grad, batch, layer.outs};
      const Operand<true> weight{layer.weight.value, layer.ins, layer.ins};
      product(shared, layer.backward_tile, grad, weight, layer.outs, Backward{epoch.layers[l - 1]}, 0, nothing);
      grid_barrier(epoch.arrived, arrivals);
    }

    const float lr = epoch.rates ? float(epoch.rates[step]) : epoch.lr;
    uint32_t tiles = 0;
    for (int64_t l = 0; l < layers; ++l) {
      const Layer& layer = epoch.layers[l];
      const Operand<true> grad{layer.grad, layer.outs, layer.outs};
      const Operand<true> x{input_of(l), layer.ins, layer.ins, layer.bias.value ? epoch.one : nullptr};
      tiles += product(shared, layer.update_tile, grad, x, batch, Update{layer, lr, epoch.momentum, epoch.weight_decay},
                       tiles, nothing);
    }
    if (step + 1 < steps) {
      // The blocks that the last tiles left idle, if they are enough.
      const int64_t idle = tiles % blocks;
      gather<pixel_t>(epoch, step + 1, batch_of(step + 1), blocks - idle >= kGatherBlocks ? idle : 0);
    }
    if (blockIdx.x == blocks - 1 && warp == 0) {
      double sum = 0;
      for (int64_t row = threadIdx.x; row < batch; row += kWarpThreads) {
        sum += epoch.row_losses[row];
      }
      sum = warp_reduce<kWarpThreads>(sum, Add{});
      if (threadIdx.x == 0) {
        epoch.losses[step] = sum / double(batch);
      }
    }
    grid_barrier(epoch.arrived, arrivals);
  }
}

}  // namespace
}  // namespace torch_mlp

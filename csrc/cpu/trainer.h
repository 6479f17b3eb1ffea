// Minibatch SGD of a multilayer perceptron with softmax cross-entropy on the CPU, many minibatches in one call.
//
//   x   = scale * image + shift, a row for each image of the minibatch
//   h_l = act_l(h_{l-1} W_l^T + b_l), h_0 = x; the last layer's are the logits z
//   gz  = (softmax(z) - [c = label]) / batch, and backwards gz_{l-1} = (gz_l W_l) * act'(h_{l-1})
//   W_l and b_l move by a step of SGD (kernels.h) with gW_l = gz_l^T h_{l-1} and gb_l = the sum of gz_l over the rows
//
// Shapes: images (N, features), labels (N,), order: the indices of the minibatches' images, one after the other; the
// last minibatch may be short.
//
// Fused: everything between the raw images and the moved weights, which never leave the caches of their thread. Where
// most pixels are 0, the first layer works on the others only (pixel_layer.h).
//
// Threads: each owns columns of every h_l, the rows of W_1 and the columns of the other W_l that go with them, and some
// rows of the softmax; they meet 2 L - 2 times in a minibatch, or twice for L = 1. Every element is summed in the same
// order whichever thread computes it. They are threads of this call's own, since a meeting needs all of them to run at
// once, which torch's parallel_for does not promise.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

#include "barrier.h"
#include "kernels.h"
#include "pixel_layer.h"
#include "scratch.h"

namespace torch_mlp {

constexpr int64_t kImageUnit = 64;   // a minibatch is filled up to a multiple of so many images with empty ones
constexpr int64_t kUpdateRows = 64;  // of a weight, whose gradients are computed at once

struct Images {
  const uint8_t* bytes;  // or
  const float* floats;
  const int64_t* labels;
  const int64_t* order;
  int64_t count;  // of order
  double scale, shift;
};

struct Options {
  int64_t batch_size;
  const double* lr;  // of each minibatch
  double momentum, weight_decay;
  bool skips_zeros;
};

class Trainer {
 public:
  Trainer(const std::vector<Layer>& layers, const Images& images, const Options& options, int64_t threads)
      : table_(kernels()),
        layers_(layers),
        images_(images),
        options_(options),
        threads_(threads),
        barrier_(threads),
        steps_(ceil_div(images.count, options.batch_size)),
        padded_batch_(ceil_div(options.batch_size, kImageUnit) * kImageUnit) {
    const int64_t features = layers_[0].ins, classes = layers_.back().outs;
    for (Minibatch& minibatch : minibatches_) {
      minibatch.labels = arena_.take<int64_t>(padded_batch_);
      if (options_.skips_zeros) {
        minibatch.rows.resize(padded_batch_);
        minibatch.columns = arena_.take<uint8_t>(padded_batch_ * features);
        minibatch.sums = arena_.take<float>(padded_batch_);
      } else {
        minibatch.input = take_matrix(features);
      }
      for (size_t l = 0; l + 1 < layers_.size(); ++l) {
        minibatch.hidden.push_back(take_matrix(layers_[l].outs));
      }
    }
    for (const Layer& layer : layers_) {
      grad_z_.push_back(take_matrix(layer.outs));
    }
    padded_logits_ = take_matrix(classes);
    logits_ = arena_.take<float>(padded_batch_ * classes);
    grad_logits_ = arena_.take<float>(padded_batch_ * classes);
    if (options_.skips_zeros) {
      pixel_layer_.emplace(layers_[0], images_.scale, images_.shift, arena_);
      no_image_ = arena_.take<uint8_t>(features);
    }
    int64_t scratch = 0, widest = 0;
    for (const Layer& layer : layers_) {
      widest = std::max({widest, padded(layer.ins), padded(layer.outs)});
      scratch = std::max({scratch, table_.linear_scratch({padded_batch_, layer.ins, layer.outs}),
                          table_.product_scratch({padded_batch_, layer.ins, layer.outs, {}, false, {}, {}}),
                          table_.product_scratch({layer.outs, layer.ins, padded_batch_, {}, false, {}, {}})});
    }
    for (int64_t t = 0; t < threads_; ++t) {
      of_threads_.push_back({arena_.take<float>(scratch), arena_.take<float>(kUpdateRows * widest),
                             arena_.take<float>(padded_batch_ * table_.pixels.most_width),
                             arena_.take<float>(5 * padded_batch_), arena_.take<double>(2 * padded_batch_),
                             arena_.take<double>(widest), arena_.take<double>(steps_)});
    }
  }

  // Trains; losses[i] becomes the mean loss of minibatch i.
  void run(double* losses) {
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads_; ++t) {
      others.emplace_back([this, t] { work(t); });
    }
    work(0);
    for (std::thread& other : others) {
      other.join();
    }
    for (int64_t i = 0; i < steps_; ++i) {
      losses[i] = 0;
      for (const Thread& thread : of_threads_) {
        losses[i] += thread.losses[i];
      }
      losses[i] /= double(size_of(i));
    }
  }

 private:
  // What belongs to a minibatch. There are two, so that the next is made ready while the present one is in use.
  struct Minibatch {
    int64_t* labels;
    Matrix input;                      // the normalised images, or, where zero pixels are skipped,
    std::vector<const uint8_t*> rows;  // the raw images,
    uint8_t* columns;                  // their transpose,
    float* sums;                       // and scale times the sum of the bytes of each
    std::vector<Matrix> hidden;        // outputs of the layers but the last
  };

  // Memory of a thread's own.
  struct Thread {
    float *scratch, *gradient, *panel, *softmax;
    double *softmax_double, *sums, *losses;
  };

  Matrix take_matrix(int64_t cols) {
    // An odd number of cache lines, so that a column of the matrix does not fall into a few sets of a cache.
    const int64_t stride = (ceil_div(cols, 16) | 1) * 16;
    return {arena_.take<float>(padded_batch_ * stride), stride};
  }

  int64_t padded(int64_t count) const { return ceil_div(count, table_.lanes) * table_.lanes; }

  int64_t size_of(int64_t step) const {
    return std::min(options_.batch_size, images_.count - step * options_.batch_size);
  }

  // Plain SGD adds -lr times the gradients. They are computed of logits' gradients times -lr, and the products that are
  // gradients of weights added to the weights as they come.
  bool adds_directly() const { return options_.momentum == 0 && options_.weight_decay == 0; }

  int64_t last() const { return int64_t(layers_.size()) - 1; }

  // A thread's part of a total, in whole units.
  Range part(int64_t total, int64_t thread, int64_t unit) const {
    const int64_t units = ceil_div(total, unit);
    return {std::min(total, units * thread / threads_ * unit), std::min(total, units * (thread + 1) / threads_ * unit)};
  }

  // The columns of a layer's inputs or outputs that a thread owns.
  Range own(int64_t total, int64_t thread) const { return part(total, thread, table_.lanes); }

  // Calls body(columns, width) for the panels that a thread owns, of about the same width, where zero pixels are
  // skipped.
  template <typename Body>
  void for_each_panel(int64_t thread, const Body& body) const {
    if (!pixel_layer_) {
      return;
    }
    const Range all = own(layers_[0].outs, thread);
    const int64_t vectors = ceil_div(all.size(), table_.lanes), count = ceil_div(all.size(), table_.pixels.most_width);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t begin = all.begin + vectors * p / count * table_.lanes;
      const int64_t end = all.begin + vectors * (p + 1) / count * table_.lanes;
      body(Range{begin, std::min(end, all.end)}, end - begin);
    }
  }

  static Matrix from_column(Matrix matrix, int64_t col) { return {matrix.data + col, matrix.stride}; }

  void work(int64_t t) {
    for_each_panel(t, [&](Range cols, int64_t) { pixel_layer_->take(cols); });
    prepare(0, t);
    barrier_.wait();
    for (int64_t i = 0; i < steps_; ++i) {
      forward(i, t);
      softmax(i, t);
      prepare(i + 1, t);
      barrier_.wait();
      backward(i, t);
    }
    for_each_panel(t, [&](Range cols, int64_t width) { pixel_layer_->give(cols, width); });
  }

  // --- a minibatch ---

  // A thread's share of what minibatch i needs before it is computed with.
  void prepare(int64_t i, int64_t t) {
    if (i >= steps_) {
      return;
    }
    Minibatch& minibatch = minibatches_[i % 2];
    const int64_t size = size_of(i), features = layers_[0].ins;
    const int64_t* order = images_.order + i * options_.batch_size;
    const Range images = part(padded_batch_, t, 16);
    for (int64_t b = images.begin; b < images.end; ++b) {
      const int64_t image = b < size ? order[b] : 0;
      minibatch.labels[b] = images_.labels[image];
      if (pixel_layer_) {
        minibatch.rows[b] = b < size ? images_.bytes + image * features : no_image_;
        minibatch.sums[b] = float(images_.scale * double(table_.pixels.sum(minibatch.rows[b], features)));
      } else {
        float* to = minibatch.input.data + b * minibatch.input.stride;
        const float scale = float(images_.scale), shift = float(images_.shift);
        images_.bytes ? table_.normalize_bytes(images_.bytes + image * features, features, scale, shift, to)
                      : table_.normalize_floats(images_.floats + image * features, features, scale, shift, to);
      }
    }
    fetch(i + 1);
    if (pixel_layer_) {
      // By pixels: two threads that write into one line of the cache would wait for each other.
      const Range pixels = part(features, t, 16);
      for (int64_t b = 0; b < padded_batch_; b += 16) {
        std::array<const uint8_t*, 16> rows;
        for (int64_t l = 0; l < 16; ++l) {
          rows[l] = (b + l < size ? images_.bytes + order[b + l] * features : no_image_) + pixels.begin;
        }
        table_.pixels.transpose(rows.data(), pixels.size(), minibatch.columns + pixels.begin * padded_batch_ + b,
                                padded_batch_);
      }
    }
  }

  // The images of minibatch i, which lie anywhere in memory. Every thread reads all of them.
  void fetch(int64_t i) const {
    const int64_t features = layers_[0].ins;
    const int64_t* order = images_.order + i * options_.batch_size;
    for (int64_t b = 0; i < steps_ && images_.bytes && b < size_of(i); ++b) {
      const uint8_t* image = images_.bytes + order[b] * features;
      for (int64_t k = 0; k < features; k += 64) {
        __builtin_prefetch(image + k, 0, 2);
      }
    }
  }

  void forward(int64_t i, int64_t t) {
    const Minibatch& minibatch = minibatches_[i % 2];
    const int64_t batch = size_of(i);
    for (int64_t l = 0; l == 0 || l < last(); ++l) {
      const Layer& layer = layers_[l];
      const Matrix output = l == last() ? padded_logits_ : minibatch.hidden[l];
      if (l == 0 && pixel_layer_) {
        for_each_panel(t, [&](Range cols, int64_t width) {
          pixel_layer_->forward(minibatch.rows.data(), minibatch.sums, batch, cols, width,
                                from_column(output, cols.begin), of_threads_[t].panel, of_threads_[t].gradient);
        });
      } else {
        const Range cols = own(layer.outs, t);
        linear(layer, cols, l == 0 ? minibatch.input : minibatch.hidden[l - 1], from_column(output, cols.begin), batch,
               t);
      }
      barrier_.wait();
    }
  }

  // Loss and gradient of a thread's rows of logits.
  void softmax(int64_t i, int64_t t) {
    const Minibatch& minibatch = minibatches_[i % 2];
    const Thread& my = of_threads_[t];
    const int64_t batch = size_of(i), classes = layers_.back().outs;
    const Range rows = part(batch, t, 16);
    const int64_t count = rows.size(), begin = rows.begin * classes;
    if (last() == 0) {
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        std::copy_n(padded_logits_.data + b * padded_logits_.stride, classes, logits_ + b * classes);
      }
    } else if (count > 0) {
      const Matrix& input = minibatch.hidden[last() - 1];
      linear(layers_.back(), {0, classes}, {input.data + rows.begin * input.stride, input.stride},
             {logits_ + begin, classes}, count, t);
    }
    float *maximum = my.softmax, *sum = maximum + count, *at_label = sum + count, *log_sum = at_label + count;
    double *loss = my.softmax_double, *numerator = loss + count;
    const int64_t* labels = minibatch.labels + rows.begin;
    table_.softmax_float.statistics(logits_ + begin, labels, count, classes, maximum, sum, at_label);
    table_.losses(maximum, sum, at_label, labels, count, log_sum, loss);
    my.losses[i] = std::accumulate(loss, loss + count, 0.0);
    const double scale = (adds_directly() ? -options_.lr[i] : 1.0) / double(batch);
    std::fill_n(numerator, count, scale);
    std::fill_n(at_label, count, float(scale));
    table_.softmax_float.gradient(logits_ + begin, nullptr, grad_logits_ + begin, count, classes, maximum, sum,
                                  numerator, nullptr, labels, at_label);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      std::copy_n(grad_logits_ + b * classes, classes, grad_z_.back().data + b * grad_z_.back().stride);
    }
  }

  void backward(int64_t i, int64_t t) {
    const Minibatch& minibatch = minibatches_[i % 2];
    const Thread& my = of_threads_[t];
    const int64_t batch = size_of(i);
    const SgdStep step{adds_directly() ? -1 : float(options_.lr[i]), float(options_.momentum),
                       float(options_.weight_decay)};
    const Range classes = own(layers_.back().outs, t);
    move_bias(last(), classes, sums_of(grad_z_.back(), classes, batch, my), step, my);
    for (int64_t l = last(); l > 0; --l) {
      // Of W_l a thread reads and moves its own columns only.
      const Layer& layer = layers_[l];
      const Range cols = own(layer.ins, t);
      const Matrix output = minibatch.hidden[l - 1], grad_output = grad_z_[l], grad_z = grad_z_[l - 1];
      if (cols.size() > 0) {
        multiply({batch,
                  cols.size(),
                  layer.outs,
                  grad_output,
                  false,
                  {layer.weight.value + cols.begin, layer.ins},
                  from_column(grad_z, cols.begin)},
                 my);
        move_weight(layer, {0, layer.outs}, cols, grad_output, output, batch, step, my);
        std::fill_n(my.sums, cols.size(), 0);
        table_.elementwise_float.activation_backward(layers_[l - 1].activation, from_column(grad_z, cols.begin),
                                                     from_column(output, cols.begin), from_column(grad_z, cols.begin),
                                                     my.sums, batch, cols.size());
        move_bias(l - 1, cols, my.sums, step, my);
      }
      if (l > 1) {
        barrier_.wait();
      }
    }
    for_each_panel(t, [&](Range cols, int64_t width) {
      const Matrix grad_z = from_column(grad_z_[0], cols.begin);
      multiply({1, cols.size(), batch, {minibatch.sums, padded_batch_}, false, grad_z, {my.panel, cols.size()}}, my);
      pixel_layer_->move(minibatch.columns, padded_batch_, grad_z, sums_of(grad_z_[0], cols, batch, my), my.panel, cols,
                         width, step, my.gradient);
    });
    if (!pixel_layer_) {
      move_weight(layers_[0], own(layers_[0].outs, t), {0, layers_[0].ins}, grad_z_[0], minibatch.input, batch, step,
                  my);
    }
  }

  // --- what they are made of, each done by the calling thread alone ---

  // The columns of a layer's output, which begin at output.
  void linear(const Layer& layer, Range cols, ConstMatrix input, Matrix output, int64_t batch, int64_t t) const {
    if (cols.size() > 0) {
      const LinearShape shape{batch, layer.ins, cols.size()};
      table_.linear({shape,
                     input,
                     {layer.weight.value + cols.begin * layer.ins, layer.ins},
                     layer.bias.value ? layer.bias.value + cols.begin : nullptr,
                     output,
                     layer.activation},
                    0, table_.linear_tasks(shape), of_threads_[t].scratch);
    }
  }

  void multiply(const Product& product, const Thread& my) const {
    table_.product(product, 0, table_.product_tasks(product), my.scratch);
  }

  // The sums over the rows of some columns.
  const double* sums_of(Matrix matrix, Range cols, int64_t rows, const Thread& my) const {
    const Matrix from = from_column(matrix, cols.begin);
    std::fill_n(my.sums, cols.size(), 0);
    table_.elementwise_float.activation_backward(ActivationKind::Identity, from, from, {nullptr, 0}, my.sums, rows,
                                                 cols.size());
    return my.sums;
  }

  void move_bias(int64_t l, Range cols, const double* sums, const SgdStep& step, const Thread& my) const {
    if (layers_[l].bias.value) {
      std::copy_n(sums, cols.size(), my.gradient);
      move(layers_[l].bias.from(cols.begin), my.gradient, cols.size(), step);
    }
  }

  // Some rows and columns of a weight, by the gradient of the layer's z and its input.
  void move_weight(const Layer& layer, Range rows, Range cols, Matrix grad_z, Matrix input, int64_t batch,
                   const SgdStep& step, const Thread& my) const {
    if (adds_directly()) {
      Product product{rows.size(),
                      cols.size(),
                      batch,
                      from_column(grad_z, rows.begin),
                      true,
                      from_column(input, cols.begin),
                      {layer.weight.value + rows.begin * layer.ins + cols.begin, layer.ins}};
      product.accumulates = true;
      if (rows.size() > 0) {
        multiply(product, my);
      }
      return;
    }
    for (int64_t row = rows.begin; row < rows.end; row += kUpdateRows) {
      const int64_t count = std::min(kUpdateRows, rows.end - row);
      multiply({count,
                cols.size(),
                batch,
                from_column(grad_z, row),
                true,
                from_column(input, cols.begin),
                {my.gradient, cols.size()}},
               my);
      for (int64_t r = 0; r < count; ++r) {
        move(layer.weight.from((row + r) * layer.ins + cols.begin), my.gradient + r * cols.size(), cols.size(), step);
      }
    }
  }

  const Kernels& table_;
  const std::vector<Layer>& layers_;
  const Images& images_;
  const Options& options_;
  const int64_t threads_;
  Barrier barrier_;
  const int64_t steps_;         // minibatches
  const int64_t padded_batch_;  // images of a minibatch, filled up
  Arena arena_;
  Minibatch minibatches_[2];
  std::vector<Matrix> grad_z_;  // of every layer
  Matrix padded_logits_;        // of a network of one layer, whose columns are computed in whole vectors
  float *logits_, *grad_logits_;
  std::vector<Thread> of_threads_;
  std::optional<PixelLayer> pixel_layer_;  // where zero pixels are skipped
  uint8_t* no_image_;
};

}  // namespace torch_mlp

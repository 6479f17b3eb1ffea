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
#include "dense_layer.h"
#include "kernels.h"
#include "pixel_layer.h"
#include "scratch.h"

namespace torch_mlp {

constexpr int64_t kImageUnit = 64;   // a minibatch is filled up to a multiple of so many images with empty ones
constexpr int64_t kFewOutputs = 16;  // of a layer, up to which bfloat16 would save nothing

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
  bool bfloat16;  // products of bfloat16, where they save time
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
    for (size_t l = 0; l < layers_.size(); ++l) {
      const bool is_dense = l > 0 || !options_.skips_zeros;
      dense_.emplace_back(layers_[l], options_.bfloat16 && is_dense && layers_[l].outs > kFewOutputs, l > 0, arena_);
      grad_z_.push_back({take_matrix<float>(padded_batch_, layers_[l].outs, arena_)});
      grad_z_[l].take_pairs(padded_batch_, layers_[l].outs, dense_[l].in_bfloat16() && l > 0, dense_[l].in_bfloat16(),
                            arena_);
    }
    for (Minibatch& minibatch : minibatches_) {
      minibatch.labels = arena_.take<int64_t>(padded_batch_);
      if (options_.skips_zeros) {
        minibatch.rows.resize(padded_batch_);
        minibatch.columns = arena_.take<uint8_t>(padded_batch_ * features);
        minibatch.sums = arena_.take<float>(padded_batch_);
      } else {
        minibatch.input = take_input(0);
      }
      for (size_t l = 1; l < layers_.size(); ++l) {
        minibatch.hidden.push_back(take_input(l));
      }
    }
    padded_logits_ = take_matrix<float>(padded_batch_, classes, arena_);
    logits_ = arena_.take<float>(padded_batch_ * classes);
    grad_logits_ = arena_.take<float>(padded_batch_ * classes);
    if (options_.skips_zeros) {
      pixel_layer_.emplace(layers_[0], images_.scale, images_.shift, arena_);
      no_image_ = arena_.take<uint8_t>(features);
    }
    int64_t scratch = 0, widest = 0;
    for (size_t l = 0; l < layers_.size(); ++l) {
      widest = std::max({widest, padded(layers_[l].ins), padded(layers_[l].outs)});
      scratch = std::max(scratch, dense_[l].scratch(padded_batch_));
    }
    for (int64_t t = 0; t < threads_; ++t) {
      of_threads_.push_back({{arena_.take<float>(scratch), arena_.take<float>(kUpdateRows * widest)},
                             arena_.take<float>(padded_batch_ * table_.pixels.most_width),
                             arena_.take<float>(5 * padded_batch_),
                             arena_.take<double>(2 * padded_batch_),
                             arena_.take<double>(widest),
                             arena_.take<double>(steps_)});
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
    Operand input;                     // the normalised images, or, where zero pixels are skipped,
    std::vector<const uint8_t*> rows;  // the raw images,
    uint8_t* columns;                  // their transpose,
    float* sums;                       // and scale times the sum of the bytes of each
    std::vector<Operand> hidden;       // outputs of the layers but the last
  };

  // Memory of a thread's own.
  struct Thread {
    Workspace workspace;
    float *panel, *softmax;
    double *softmax_double, *sums, *losses;
  };

  // Memory for the input of a layer.
  Operand take_input(size_t l) {
    const int64_t ins = layers_[l].ins;
    Operand input;
    if (l > 0 || !dense_[l].in_bfloat16()) {
      input.values = take_matrix<float>(padded_batch_, ins, arena_);
    }
    input.take_pairs(padded_batch_, ins, dense_[l].in_bfloat16(), dense_[l].in_bfloat16(), arena_);
    return input;
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

  void work(int64_t t) {
    for_each_panel(t, [&](Range cols, int64_t) { pixel_layer_->take(cols); });
    for (int64_t l = 0; l <= last(); ++l) {
      const Layer& layer = layers_[l];
      l ? dense_[l].pair_weight({0, layer.outs}, own(layer.ins, t))
        : dense_[l].pair_weight(own(layer.outs, t), {0, layer.ins});
    }
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
      } else if (b < size) {
        // Of pairs the values are needed no longer than it takes to make them, of two images at once.
        const Operand& input = minibatch.input;
        const bool is_kept = input.values.data, is_second = b % 2;
        float* to = is_kept ? input.values.data + b * input.values.stride
                            : of_threads_[t].workspace.gradient + (is_second ? features : 0);
        const float scale = float(images_.scale), shift = float(images_.shift);
        images_.bytes ? table_.normalize_bytes(images_.bytes + image * features, features, scale, shift, to)
                      : table_.normalize_floats(images_.floats + image * features, features, scale, shift, to);
        if (!is_kept && (is_second || b + 1 == size)) {
          const Rows<bfloat16_pair> columns = input.columns, rows = input.rows;
          const int64_t first = b / 2 * 2, count = is_second ? 2 : 1;
          Operand{{of_threads_[t].workspace.gradient, features},
                  {columns.data + first * columns.stride, columns.stride},
                  {rows.data + first / 2 * rows.stride, rows.stride}}
              .pair({0, count}, {0, features});
        }
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
      const Operand output = l == last() ? Operand{padded_logits_} : minibatch.hidden[l];
      const Range own_cols = own(layers_[l].outs, t);
      if (l == 0 && pixel_layer_) {
        for_each_panel(t, [&](Range cols, int64_t width) {
          pixel_layer_->forward(minibatch.rows.data(), minibatch.sums, batch, cols, width,
                                from_column(output.values, cols.begin), of_threads_[t].panel,
                                of_threads_[t].workspace.gradient);
        });
      } else if (own_cols.size() > 0) {
        dense_[l].forward(l == 0 ? minibatch.input : minibatch.hidden[l - 1], batch, own_cols,
                          from_column(output.values, own_cols.begin), of_threads_[t].workspace);
      }
      output.pair({0, batch}, own_cols);
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
      // By rows, which a layer in bfloat16 takes as pairs of columns.
      const Operand& input = minibatch.hidden[last() - 1];
      const Operand of_rows{{input.values.data + rows.begin * input.values.stride, input.values.stride},
                            {input.columns.data + rows.begin * input.columns.stride, input.columns.stride}};
      dense_.back().forward(of_rows, count, {0, classes}, {logits_ + begin, classes}, my.workspace);
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
      std::copy_n(grad_logits_ + b * classes, classes, grad_z_.back().values.data + b * grad_z_.back().values.stride);
    }
    grad_z_.back().pair(rows, {0, classes});
  }

  void backward(int64_t i, int64_t t) {
    const Minibatch& minibatch = minibatches_[i % 2];
    const Thread& my = of_threads_[t];
    const int64_t batch = size_of(i);
    const SgdStep step{adds_directly() ? -1 : float(options_.lr[i]), float(options_.momentum),
                       float(options_.weight_decay)};
    const Range classes = own(layers_.back().outs, t);
    move_bias(last(), classes, sums_of(grad_z_.back().values, classes, batch, my), step, my);
    for (int64_t l = last(); l > 0; --l) {
      // Of W_l a thread reads and moves its own columns only.
      const Layer& layer = layers_[l];
      const Range cols = own(layer.ins, t);
      const Operand &output = minibatch.hidden[l - 1], &grad_z = grad_z_[l - 1];
      const Matrix grad_cols = from_column(grad_z.values, cols.begin);
      if (cols.size() > 0) {
        dense_[l].backward(grad_z_[l], batch, cols, grad_cols, my.workspace);
        dense_[l].move_weight({0, layer.outs}, cols, grad_z_[l], output, batch, step, adds_directly(), my.workspace);
        std::fill_n(my.sums, cols.size(), 0);
        table_.elementwise_float.activation_backward(layers_[l - 1].activation, grad_cols,
                                                     from_column(output.values, cols.begin), grad_cols, my.sums, batch,
                                                     cols.size());
        move_bias(l - 1, cols, my.sums, step, my);
        grad_z.pair({0, batch}, cols);
      }
      if (l > 1) {
        barrier_.wait();
      }
    }
    for_each_panel(t, [&](Range cols, int64_t width) {
      const Matrix grad_z = from_column(grad_z_[0].values, cols.begin);
      multiply<float>({1, cols.size(), batch, {minibatch.sums, padded_batch_}, false, grad_z, {my.panel, cols.size()}},
                      my.workspace);
      pixel_layer_->move(minibatch.columns, padded_batch_, grad_z, sums_of(grad_z_[0].values, cols, batch, my),
                         my.panel, cols, width, step, my.workspace.gradient);
    });
    if (!pixel_layer_) {
      dense_[0].move_weight(own(layers_[0].outs, t), {0, layers_[0].ins}, grad_z_[0], minibatch.input, batch, step,
                            adds_directly(), my.workspace);
    }
  }

  // --- what they are made of, each done by the calling thread alone ---

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
      std::copy_n(sums, cols.size(), my.workspace.gradient);
      move(layers_[l].bias.from(cols.begin), my.workspace.gradient, cols.size(), step);
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
  std::vector<DenseLayer> dense_;  // all of them, though a pixel layer does the work of the first
  std::vector<Operand> grad_z_;    // of every layer
  Matrix padded_logits_;           // of a network of one layer, whose columns are computed in whole vectors
  float *logits_, *grad_logits_;
  std::vector<Thread> of_threads_;
  std::optional<PixelLayer> pixel_layer_;  // where zero pixels are skipped
  uint8_t* no_image_;
};

}  // namespace torch_mlp

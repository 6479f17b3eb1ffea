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
// Threads: each owns columns of every h_l, the rows of W_1 and the columns of the other W_l that go with them. Of the
// logits each adds what its own columns of the last h_l give, and each computes the softmax of all rows for itself
// where the classes are few. So they meet 2 L - 3 times in a minibatch, at least once. Every element is summed in an
// order that depends on the number of threads alone. They are threads of this call's own, since a meeting needs all of
// them to run at once, which torch's parallel_for does not promise.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <future>
#include <numeric>
#include <optional>
#include <system_error>
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
constexpr int64_t kFewClasses = 64;  // whose softmax is not worth dividing among threads

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
      grad_z_.push_back(l > 0 && int64_t(l) < last() ? take_grad_z(l) : Operand{});
    }
    minibatches_.resize(threads_ == 1 ? 2 : 3);
    for (Minibatch& minibatch : minibatches_) {
      minibatch.labels = arena_.take<int64_t>(padded_batch_);
      if (options_.skips_zeros) {
        minibatch.rows.resize(padded_batch_);
        minibatch.columns = arena_.take<uint8_t>(padded_batch_ * features);
        minibatch.sums = arena_.take<float>(padded_batch_);
      } else {
        minibatch.input = take_input(0);
      }
      for (int64_t l = 1; l < last(); ++l) {
        minibatch.hidden.push_back(take_input(l));
      }
    }
    for (Matrix& logits : padded_logits_) {
      logits = take_matrix<float>(padded_batch_, last() == 0 ? classes : 0, arena_);
    }
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
      const auto logits = [&] { return arena_.take<float>(padded_batch_ * classes); };
      of_threads_.push_back({{arena_.take<float>(scratch), arena_.take<float>(kUpdateRows * widest)},
                             arena_.take<float>(padded_batch_ * table_.pixels.most_width),
                             {logits(), logits()},
                             logits(),
                             logits(),
                             last() > 0 ? take_input(last()) : Operand{},
                             take_grad_z(0),
                             take_grad_z(last()),
                             arena_.take<float>(5 * padded_batch_),
                             arena_.take<double>(padded_batch_),
                             arena_.take<double>(widest),
                             arena_.take<double>(steps_)});
    }
  }

  // Trains; losses[i] becomes the mean loss of minibatch i.
  void run(double* losses) {
    // They wait for each other: none may begin before all are there.
    std::promise<bool> start;
    const std::shared_future<bool> may_begin = start.get_future().share();
    std::vector<std::thread> others;
    others.reserve(threads_);
    try {
      for (int64_t t = 1; t < threads_; ++t) {
        others.emplace_back([this, t, may_begin] {
          if (may_begin.get()) {
            work(t);
          }
        });
      }
    } catch (const std::system_error&) {  // said below
    }
    const int64_t count = 1 + int64_t(others.size());
    start.set_value(count == threads_);
    if (count == threads_) {
      work(0);
    }
    for (std::thread& other : others) {
      other.join();
    }
    check(count == threads_, "train_epoch: expected ", threads_, " threads, got ", count,
          ": the system starts no more; torch.set_num_threads asks for fewer");
    for (int64_t i = 0; i < steps_; ++i) {
      losses[i] = 0;
      for (const Thread& thread : of_threads_) {
        losses[i] += thread.losses[i];
      }
      losses[i] /= double(size_of(i));
    }
  }

 private:
  // What belongs to a minibatch. There are two, so that the next one is made ready while the present one is in use; or
  // three, where another thread may still be using the last one.
  struct Minibatch {
    int64_t* labels;
    Operand input;                     // the normalised images, or, where zero pixels are skipped,
    std::vector<const uint8_t*> rows;  // the raw images,
    uint8_t* columns;                  // their transpose,
    float* sums;                       // and scale times the sum of the bytes of each
    std::vector<Operand> hidden;       // outputs of the layers but the last two
  };

  // Memory of a thread's own.
  struct Thread {
    Workspace workspace;
    float* panel;
    float* logits_part[2];  // the thread's part of the sum, of two minibatches in turns
    float *logits, *grad_logits;
    // What no other thread reads lies apart, or fetching ahead would take lines from each other's caches: its columns
    // of the last layer's input and of the gradient of the first layer's z; and all of the last layer's.
    Operand last_input, first_grad_z, grad_z;
    float* softmax;
    double *softmax_double, *sums, *losses;
  };

  // Memory for the gradient of a layer's z.
  Operand take_grad_z(int64_t l) {
    const int64_t outs = layers_[l].outs;
    Operand grad_z{take_matrix<float>(padded_batch_, outs, arena_)};
    grad_z.take_pairs(padded_batch_, outs, dense_[l].in_bfloat16() && l > 0, dense_[l].in_bfloat16(), arena_);
    return grad_z;
  }

  // Memory for the input of a layer.
  Operand take_input(int64_t l) {
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
      prepare(i + 1, t);
      barrier_.wait();
      softmax(i, t);
      backward(i, t);
    }
    first_layer(steps_, t);
    for_each_panel(t, [&](Range cols, int64_t width) { pixel_layer_->give(cols, width); });
  }

  const Minibatch& minibatch_of(int64_t i) const { return minibatches_[size_t(i) % minibatches_.size()]; }

  SgdStep step_of(int64_t i) const {
    return {adds_directly() ? -1 : float(options_.lr[i]), float(options_.momentum), float(options_.weight_decay)};
  }

  bool divides_softmax() const { return layers_.back().outs > kFewClasses; }

  const Operand& hidden_of(int64_t i, int64_t l, int64_t t) const {
    return l + 1 < last() ? minibatch_of(i).hidden[l] : of_threads_[t].last_input;
  }

  const Operand& grad_z_of(int64_t l, int64_t t) const {
    return l == last() ? of_threads_[divides_softmax() ? 0 : t].grad_z : l ? grad_z_[l] : of_threads_[t].first_grad_z;
  }

  // --- a minibatch ---

  // A thread's share of what minibatch i needs before it is computed with.
  void prepare(int64_t i, int64_t t) {
    if (i >= steps_) {
      return;
    }
    Minibatch& minibatch = minibatches_[size_t(i) % minibatches_.size()];
    const int64_t size = size_of(i), features = layers_[0].ins;
    const int64_t* order = images_.order + i * options_.batch_size;
    const Range images = part(padded_batch_, t, 16);
    const int64_t next = images_.bytes && i + 1 < steps_ ? size_of(i + 1) : 0;
    int64_t fetched = 0;
    for (int64_t b = images.begin; b < images.end; ++b) {
      // The images after these, which lie anywhere in memory, a few at a time. In a function of its own this would be
      // dropped: to GCC it does nothing.
      for (; fetched * images.size() < next * (b + 1 - images.begin); ++fetched) {
        const uint8_t* image = images_.bytes + order[options_.batch_size + fetched] * features;
        for (int64_t k = 0; k < features; k += 64) {
          __builtin_prefetch(image + k, 0, 2);
        }
      }
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
          input.pair_from({of_threads_[t].workspace.gradient, features}, {b / 2 * 2, b + 1}, {0, features});
        }
      }
    }
    if (pixel_layer_) {
      // By pixels: two threads that write into one line of the cache would wait for each other.
      const Range pixels = part(features, t, 16);
      for (int64_t b = 0; b < padded_batch_; b += kImageUnit) {
        std::array<const uint8_t*, kImageUnit> rows;
        for (int64_t l = 0; l < kImageUnit; ++l) {
          rows[l] = (b + l < size ? images_.bytes + order[b + l] * features : no_image_) + pixels.begin;
        }
        table_.pixels.transpose(rows.data(), pixels.size(), minibatch.columns + pixels.begin * padded_batch_ + b,
                                padded_batch_);
      }
    }
  }

  // The first layer's step with minibatch i - 1 and its output for minibatch i: what a panel of its weight is fetched
  // for once.
  void first_layer(int64_t i, int64_t t) {
    const Thread& my = of_threads_[t];
    const bool moves = i > 0, goes_on = i < steps_;
    const Minibatch &before = minibatch_of(std::max<int64_t>(0, i - 1)), &minibatch = minibatch_of(i);
    const Operand &grad_z = grad_z_of(0, t),
                  &output = last() == 0 ? Operand{padded_logits_[i % 2]} : hidden_of(i, 0, t);
    for_each_panel(t, [&](Range cols, int64_t width) {
      if (moves) {
        const int64_t batch = size_of(i - 1);
        const Matrix grad_cols = from_column(grad_z.values, cols.begin);
        multiply<float>(
            {1, cols.size(), batch, {before.sums, padded_batch_}, false, grad_cols, {my.panel, cols.size()}},
            my.workspace);
        pixel_layer_->move(before.columns, padded_batch_, grad_cols, sums_of(grad_z.values, cols, batch, my), my.panel,
                           cols, width, step_of(i - 1), my.workspace.gradient);
      }
      if (goes_on) {
        pixel_layer_->forward(minibatch.rows.data(), minibatch.sums, size_of(i), cols, width,
                              from_column(output.values, cols.begin), my.panel, my.workspace.gradient);
      }
    });
    const Range outs = own(layers_[0].outs, t);
    if (!pixel_layer_ && outs.size() > 0) {
      const Range ins{0, layers_[0].ins};
      if (moves) {
        dense_[0].move_weight(outs, ins, grad_z, before.input, size_of(i - 1), step_of(i - 1), adds_directly(),
                              my.workspace);
      }
      if (goes_on) {
        dense_[0].forward(minibatch.input, size_of(i), outs, from_column(output.values, outs.begin), my.workspace);
      }
    }
    if (goes_on) {
      output.pair({0, size_of(i)}, outs);
    }
  }

  void forward(int64_t i, int64_t t) {
    const Thread& my = of_threads_[t];
    const int64_t batch = size_of(i);
    first_layer(i, t);
    for (int64_t l = 1; l < last(); ++l) {
      barrier_.wait();
      const Operand& output = hidden_of(i, l, t);
      if (const Range cols = own(layers_[l].outs, t); cols.size() > 0) {
        dense_[l].forward(hidden_of(i, l - 1, t), batch, cols, from_column(output.values, cols.begin), my.workspace);
        output.pair({0, batch}, cols);
      }
    }
    const Range cols = own(layers_.back().ins, t);
    if (last() > 0 && cols.size() > 0) {
      dense_.back().forward_part(my.last_input, batch, cols, adds_last_bias(t), my.logits_part[i % 2], my.workspace);
    }
  }

  // The last thread always owns something.
  bool adds_last_bias(int64_t t) const { return t == threads_ - 1; }

  // Some rows of the logits, one after the other.
  const float* gather_logits(int64_t i, int64_t t, Range rows) const {
    const int64_t classes = layers_.back().outs, count = rows.size() * classes, begin = rows.begin * classes;
    float* logits = of_threads_[t].logits;
    if (last() == 0) {
      const Matrix from = padded_logits_[i % 2];
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        std::copy_n(from.data + b * from.stride, classes, logits + (b - rows.begin) * classes);
      }
      return logits;
    }
    if (threads_ == 1) {
      return of_threads_[t].logits_part[i % 2] + begin;
    }
    std::fill_n(logits, count, 0);
    for (int64_t other = 0; other < threads_; ++other) {
      if (own(layers_.back().ins, other).size() > 0) {
        const float* part = of_threads_[other].logits_part[i % 2] + begin;
        std::transform(part, part + count, logits, logits, [](float value, float sum) { return sum + value; });
      }
    }
    return logits;
  }

  // Losses, and the gradient of the last layer's z: all of it, or for many classes a thread's rows.
  void softmax(int64_t i, int64_t t) {
    const Thread& my = of_threads_[t];
    const int64_t batch = size_of(i), classes = layers_.back().outs;
    const Range rows = divides_softmax() ? part(batch, t, 16) : Range{0, batch};
    const int64_t count = rows.size();
    const float* logits = gather_logits(i, t, rows);
    float *maximum = my.softmax, *sum = maximum + count, *at_label = sum + count, *log_sum = at_label + count;
    float* numerator = log_sum + count;
    const int64_t* labels = minibatch_of(i).labels + rows.begin;
    // Of all rows, and what is taken from it at the label.
    std::fill_n(numerator, count, float((adds_directly() ? -options_.lr[i] : 1.0) / double(batch)));
    table_.softmax_float.statistics_and_gradient(logits, my.grad_logits, count, classes, labels,
                                                 {nullptr, numerator, nullptr, numerator}, maximum, sum, at_label);
    table_.losses(maximum, sum, at_label, labels, count, log_sum, my.softmax_double);
    if (divides_softmax() || t == 0) {
      my.losses[i] = std::accumulate(my.softmax_double, my.softmax_double + count, 0.0);
    }
    const Operand& grad_z = grad_z_of(last(), t);
    for (int64_t b = 0; b < count; ++b) {
      std::copy_n(my.grad_logits + b * classes, classes, grad_z.values.data + (rows.begin + b) * grad_z.values.stride);
    }
    grad_z.pair(rows, {0, classes});
    if (divides_softmax()) {
      barrier_.wait();
    }
  }

  // All but the first layer's step.
  void backward(int64_t i, int64_t t) {
    const Thread& my = of_threads_[t];
    const int64_t batch = size_of(i), classes = layers_.back().outs;
    const SgdStep step = step_of(i);
    // Whoever adds a bias moves it.
    const Range of_bias = last() == 0 ? own(classes, t) : Range{0, adds_last_bias(t) ? classes : 0};
    move_bias(last(), of_bias, sums_of(grad_z_of(last(), t).values, of_bias, batch, my), step, my);
    for (int64_t l = last(); l > 0; --l) {
      // Of W_l a thread reads and moves its own columns only.
      const Layer& layer = layers_[l];
      const Range cols = own(layer.ins, t);
      const Operand &output = hidden_of(i, l - 1, t), &grad_z = grad_z_of(l, t), &grad_input = grad_z_of(l - 1, t);
      const Matrix grad_cols = from_column(grad_input.values, cols.begin);
      if (cols.size() > 0) {
        dense_[l].backward(grad_z, batch, cols, grad_cols, my.workspace);
        dense_[l].move_weight({0, layer.outs}, cols, grad_z, output, batch, step, adds_directly(), my.workspace);
        std::fill_n(my.sums, cols.size(), 0);
        table_.elementwise_float.activation_backward(layers_[l - 1].activation, grad_cols,
                                                     from_column(output.values, cols.begin), grad_cols, my.sums, batch,
                                                     cols.size());
        move_bias(l - 1, cols, my.sums, step, my);
        grad_input.pair({0, batch}, cols);
      }
      if (l > 1) {
        barrier_.wait();
      }
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
  std::vector<Minibatch> minibatches_;
  std::vector<DenseLayer> dense_;  // all of them, though a pixel layer does the work of the first
  std::vector<Operand> grad_z_;    // of every layer but the last
  Matrix padded_logits_[2];        // of a network of one layer, whose columns are computed in whole vectors
  std::vector<Thread> of_threads_;
  std::optional<PixelLayer> pixel_layer_;  // where zero pixels are skipped
  uint8_t* no_image_;
};

}  // namespace torch_mlp

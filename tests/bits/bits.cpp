// SPDX-License-Identifier: Apache-2.0
// Prints one hash a tensor for layers of many shapes: routing, forward, backward, losses, an
// optimiser step. The lines must not depend on the build of the library, nor on compiler flags.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mole/mole.hpp"

namespace {

using mole::Index;
using mole::MatView;

struct Shape {
  Index tokens, in, out, experts;
};

constexpr Shape kShapes[] = {{1, 7, 5, 3}, {5, 1, 1, 1}, {23, 67, 131, 5}, {130, 96, 64, 9}};
constexpr int kSteps = 2;

/// FNV-1a over the bytes of the elements.
class Hash {
 public:
  template <class V>
  void add(MatView<V> view) {
    for (Index r = 0; r < view.rows; ++r) {
      for (Index c = 0; c < view.cols; ++c) add_bytes(&view(r, c), sizeof(V));
    }
  }
  template <class V>
  void add(std::span<V> values) {
    add(mole::as_row(values));
  }
  void print(const std::string& name) const {
    std::printf("%s %016" PRIx64 "\n", name.c_str(), h_);
  }

 private:
  void add_bytes(const void* from, std::size_t count) {
    const auto* bytes = static_cast<const unsigned char*>(from);
    for (std::size_t i = 0; i < count; ++i) h_ = (h_ ^ bytes[i]) * 0x100000001b3u;
  }

  std::uint64_t h_ = 0xcbf29ce484222325u;
};

template <class... Tensors>
void print(const std::string& name, const Tensors&... tensors) {
  Hash hash;
  (hash.add(tensors), ...);
  hash.print(name);
}

/// Memory and numbers of one run.
template <class T>
class Source {
 public:
  MatView<T> zeros(Index rows, Index cols) {
    const MatView<T> made = memory_.take<T>(rows, cols);
    for (Index i = 0; i < made.size(); ++i) made.data[i] = T(0);
    return made;
  }
  MatView<T> normal(Index rows, Index cols, double size = 1) {
    const MatView<T> made = zeros(rows, cols);
    fill(made, size);
    return made;
  }
  template <class V>
  void fill(MatView<V> view, double size) {
    for (Index r = 0; r < view.rows; ++r) {
      for (Index c = 0; c < view.cols; ++c) {
        view(r, c) = V(static_cast<T>(size * random_.normal(next_++)));
      }
    }
  }
  mole::Workspace& memory() { return memory_; }

 private:
  mole::Buffer block_{std::size_t{1} << 24};
  mole::Workspace memory_{block_.span()};
  mole::Random random_{2024};
  std::uint64_t next_ = 0;
};

/// What a run switches on besides the layer itself.
template <class Layer>
struct Extras {
  bool fan_in_fan_out = false;
  double dropout = 0;
  typename Layer::Buffers buffers = {};
};

template <class Layer>
class Run {
 public:
  using T = typename Layer::Scalar;
  using Params = typename Layer::template Params<T>;

  Run(std::string name, Layer layer, const Shape& shape, const Extras<Layer>& extras)
      : name_(std::move(name)), extras_(extras), shape_(shape) {
    weights_ = make_params(layer, 0.3);
    session_.emplace(
        std::move(layer), as_weights(),
        mole::SessionOptions{.max_tokens = shape.tokens, .workers = 2, .training = true});
    input_ = mole::LayerInput<T>(source_.normal(shape.tokens, shape.in));
    dy_ = source_.normal(shape.tokens, shape.out);
    if (extras.dropout > 0) {
      const MatView<T> factor = source_.zeros(shape.tokens, shape.in);
      mole::fill_dropout(extras.dropout, mole::Random(7), factor);
      input_.dropout = factor;
      print(name_ + " dropout", factor);
    }
  }

  /// Some steps of training; the last forward shows the weights after the last step.
  void operator()() {
    const Params first = make_params(session_->layer(), 0),
                 second = make_params(session_->layer(), 0);
    for (int step = 1; step <= kSteps; ++step) {
      const std::string name = name_ + " step " + std::to_string(step) + " ";
      forward(name);
      const Params grad = make_params(session_->layer(), 0);
      backward(name, grad);
      mole::adamw_step(weights_, grad, first, second, {.learning_rate = 0.01}, step);
      print_params(name + "weights ", weights_);
      session_->update(as_weights());
    }
    forward(name_ + " end ");
  }

 private:
  Params make_params(const Layer& layer, double size) {
    const auto& experts = layer.mixture().experts();
    Params made;
    made.weight = extras_.fan_in_fan_out ? source_.zeros(shape_.in, shape_.out)
                                         : source_.zeros(shape_.out, shape_.in);
    made.bias = source_.zeros(1, shape_.out);
    made.mixture.router = layer.router().make_params(source_.memory());
    made.mixture.experts = experts.template make_params<T>(source_.memory());
    Params::visit([&](const mole::Leaf&, const auto& view) { source_.fill(view, size); }, made);
    return made;
  }

  typename Layer::Weights as_weights() const {
    return {weights_.weight, weights_.bias, {weights_.mixture.router, weights_.mixture.experts}};
  }

  void forward(const std::string& name) {
    const MatView<T> y = source_.zeros(shape_.tokens, shape_.out);
    session_->forward(input_, y, extras_.buffers);
    const mole::Routing<T> routing = session_->routing();
    const auto& tape = session_->tape();
    print(name + "y", y);
    print(name + "routing", routing.token_begin, routing.expert, routing.gate);
    print(name + "scores", tape.router.logits, tape.router.prob);
  }

  void backward(const std::string& name, const Params& grad) {
    const auto prob = session_->tape().router.prob, dprob = session_->d_tape().prob;
    const T loss = mole::balance_loss(mole::BalanceLoss<T>{.weight = T(0.7)}, session_->routing(),
                                      prob, dprob, session_->context());
    print(name + "loss", std::span<const T>(&loss, 1));
    const MatView<T> dx = source_.zeros(shape_.tokens, shape_.in);
    session_->backward(as_weights(), input_, dy_, {.x = dx}, grad, extras_.buffers);
    print(name + "dx", dx);
    print_params(name + "grad ", grad);
  }

  static void print_params(const std::string& name, const Params& params) {
    Params::visit(
        [&](const mole::Leaf& leaf, const auto& view) { print(name + leaf.path(), view); }, params);
  }

  std::string name_;
  Extras<Layer> extras_;
  Shape shape_;
  Source<T> source_;
  Params weights_;
  mole::LayerInput<T> input_;
  MatView<T> dy_;
  std::optional<mole::Session<Layer>> session_;
};

template <class Router, class Bank>
void run(const std::string& name, const Router& router, const Bank& bank, const Shape& shape,
         Extras<mole::AdaptedLinear<mole::Mixture<Router, Bank>>> extras = {}) {
  using Layer = mole::AdaptedLinear<mole::Mixture<Router, Bank>>;
  Layer layer{mole::Mixture<Router, Bank>{router, bank}, {.fan_in_fan_out = extras.fan_in_fan_out}};
  Run<Layer>(name, std::move(layer), shape, extras)();
}

template <class T>
mole::LoraBank<T> lora_bank(const Shape& shape, bool bias) {
  typename mole::LoraBank<T>::Config config;
  config.in = shape.in;
  config.out = shape.out;
  config.bias = bias;
  for (Index e = 0; e < shape.experts; ++e) {
    config.rank.push_back(e % 4 == 3 ? 0 : 3 + 5 * (e % 3));
    config.scale.push_back(T(2) / static_cast<T>(e + 3));
  }
  return mole::LoraBank<T>(config);
}

template <class T>
void run_top_k(const std::string& name, const Shape& shape) {
  using Router = mole::TopKRouter<T>;
  const Index k = std::min<Index>(2, shape.experts);
  typename Router::Config config{.width = shape.in, .experts = shape.experts, .k = k};
  run(name + "top_k", Router(config), lora_bank<T>(shape, false), shape);
  config.temperature = T(0.7);
  config.bias = true;
  config.probes = true;
  run(name + "top_k probes", Router(config), lora_bank<T>(shape, true), shape, {.dropout = 0.1});
  config.probes = false;
  config.order = Router::Order::topk_then_score;
  run(name + "top_k after", Router(config), lora_bank<T>(shape, false), shape,
      {.fan_in_fan_out = true});

  std::vector<T> selection_bias;
  for (Index e = 0; e < shape.experts; ++e) selection_bias.push_back(static_cast<T>(e % 3) / T(10));
  config.order = Router::Order::score_then_topk;
  config.scale = T(2.5);
  for (const mole::Score score : {mole::Score::sigmoid, mole::Score::sqrt_softplus}) {
    const bool sigmoid = score == mole::Score::sigmoid;
    config.score = score;
    config.renorm_epsilon = sigmoid ? T(0) : T(1e-3);
    run(name + (sigmoid ? "top_k sigmoid" : "top_k sqrt_softplus"), Router(config),
        lora_bank<T>(shape, true), shape, {.buffers = {selection_bias}});
  }
}

template <class T>
void run_dense(const std::string& name, const Shape& shape) {
  const mole::DenseRouter<T> router(
      {.width = shape.in, .experts = shape.experts, .temperature = T(1.3), .bias = true});
  const std::vector<T> scale(static_cast<std::size_t>(shape.experts), T(0.75));
  run(name + "dense", router, lora_bank<T>(shape, false), shape, {.dropout = 0.25});
  const mole::SharedDownBank<T> down({.in = shape.in, .out = shape.out, .rank = 6, .scale = scale});
  run(name + "dense shared_down", router, down, shape);
  const mole::SharedUpBank<T> up({.in = shape.in, .out = shape.out, .rank = 6, .scale = scale});
  run(name + "dense shared_up", router, up, shape);
}

/// Inference with stored halves: the weights widen on the way into the packed copy.
template <class W>
void run_stored(const std::string& name, const Shape& shape) {
  const mole::LoraBank<float, W> bank(
      {.in = shape.in, .out = shape.out, .rank = {8, 3}, .scale = {0.5f, -1.5f}});
  const mole::UnitRouter<float> router({.width = shape.in, .experts = 2});
  Source<float> source;
  const auto weights = bank.template make_params<W>(source.memory());
  weights.visit([&](const mole::Leaf&, const auto& view) { source.fill(view, 1); }, weights);
  mole::Session<mole::Mixture<mole::UnitRouter<float>, mole::LoraBank<float, W>>> session(
      mole::Mixture{router, bank}, {{}, weights}, {.max_tokens = shape.tokens});
  const MatView<float> x = source.normal(shape.tokens, shape.in);
  const MatView<float> y = source.normal(shape.tokens, shape.out);
  session.forward(x, y);
  print(name + "y", y);
}

template <class T>
void run_merge(const std::string& name, const Shape& shape) {
  Source<T> source;
  const MatView<T> down = source.normal(4, shape.in), up = source.normal(shape.out, 4);
  const MatView<T> weight = source.normal(shape.out, shape.in);
  mole::merge_lora(down, up, T(1.7), weight);
  print(name + "merge", weight);
}

template <class T>
void run_all(const std::string& type) {
  for (const Shape& shape : kShapes) {
    const std::string name = type + " " + std::to_string(shape.tokens) + "x" +
                             std::to_string(shape.in) + "x" + std::to_string(shape.out) + " ";
    run_top_k<T>(name, shape);
    run_dense<T>(name, shape);
    run_merge<T>(name, shape);
    if constexpr (std::is_same_v<T, float>) {
      run_stored<mole::bf16>(name + "bf16 ", shape);
      run_stored<mole::f16>(name + "f16 ", shape);
    }
  }
}

}  // namespace

int main() {
  run_all<float>("float");
  run_all<double>("double");
}

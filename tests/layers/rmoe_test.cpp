// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/rmoe.hpp"

#include <vector>

#include "layers/layer_trial.hpp"
#include "mole/experts/lora_bank.hpp"

namespace {

using mole::Index;
using mole::MatView;

constexpr Index kTokens = 19, kWidth = 7, kState = 3;

template <class T>
mole::LoraBank<T> bank() {
  return mole::LoraBank<T>({.in = kWidth,
                            .out = kWidth,
                            .rank = {2, 1, 3, 0, 2},
                            .scale = {T(1), T(0.5), T(-1), T(1), T(2)}});
}

template <class T>
typename mole::Rmoe<mole::LoraBank<T>>::Config everything() {
  return {.layers = 4,
          .state = kState,
          .k = 2,
          .rms_norm = true,
          .norm_epsilon = T(0.125),
          .share = 3,
          .moe_weight = T(0.75),
          .share_weight = T(0.5),
          .activation = mole::Activation::gelu,
          .out_bias = true,
          .base = true,
          .dense_layers = {1}};
}

/// A stack with everything, a start state, and a loss on the last state.
template <class T>
struct Trial : test::LayerTrial<T> {
  using Layer = mole::Rmoe<mole::LoraBank<T>>;
  using Tensor = typename test::LayerTrial<T>::Tensor;

  explicit Trial(typename Layer::Config config = everything<T>()) : layer(bank<T>(), config) {
    params = layer.make_params(this->exact(layer.params_bytes()));
    grad = layer.make_params(this->exact(layer.params_bytes()));
    this->adopt(params, grad);
    x = this->input("x", kTokens, kWidth);
    start = this->input("start", kTokens, kState);
    this->y = this->zeros(kTokens, kWidth + kState);
    this->dy = this->normal(kTokens, kWidth + kState);
    tape = layer.make_tape(this->exact(layer.tape_bytes(kTokens + 2)), kTokens + 2);
    d = layer.make_gradient(this->exact(layer.routers().gradient_bytes(kTokens + 2)), kTokens + 2);
    for (const auto& experts : params.experts) of_layers.push_back(experts);
    weights.router = params.router;
    weights.experts = of_layers;
    weights.norm = params.norm;
    weights.base = params.base;
    weights.bias = params.bias;
    weights.share_gate = params.share_gate;
    weights.share_up = params.share_up;
    weights.share_down = params.share_down;
  }

  std::size_t scratch_bytes(int workers) const { return layer.scratch_bytes(kTokens, workers); }
  void forward(const mole::Context& context) {
    mole::Workspace packing = this->packing(layer.prepared_bytes());
    layer.forward(layer.prepare(weights, packing), x.value, start.value,
                  this->y.col_block(0, kWidth), tape, context);
    mole::rows::copy<T>(layer.routers().state(tape.routers), this->y.col_block(kWidth, kState));
  }
  void backward(const mole::Context& context) {
    layer.begin_backward(tape, this->dy.col_block(kWidth, kState), d);
    layer.backward(weights, tape, this->dy.col_block(0, kWidth), d, x.gradient, grad, context);
    mole::rows::add<T>(1, layer.routers().d_start(d), start.gradient);
  }

  Layer layer;
  typename Layer::template Params<T> params, grad;
  typename Layer::Weights weights;
  std::vector<typename mole::LoraBank<T>::Weights> of_layers;
  typename Layer::Tape tape;
  typename Layer::Gradient d;
  Tensor x, start;
};

template <class T>
typename mole::Rmoe<mole::LoraBank<T>>::Config raw() {
  auto config = everything<T>();
  config.renormalise = false;
  config.cell = mole::CellKind::rnn;
  return config;
}
template <class T>
struct RawTrial : Trial<T> {
  RawTrial() : Trial<T>(raw<T>()) {}
};

}  // namespace

TEST_CASE("a recurrent stack keeps what every layer keeps", "[layers]") {
  test::check_layer<Trial>();
  test::check_layer<RawTrial>();
}

TEST_CASE("a stack in inference gives the bits of training", "[layers]") {
  Trial<float> trial;
  test::run(trial, false);
  const std::vector<float> expected = trial.results();
  trial.tape =
      trial.layer.make_tape(trial.exact(trial.layer.tape_bytes(kTokens, false)), kTokens, false);
  test::run(trial, false);
  CHECK(test::bit_difference(trial.results(), expected) == "");
}

TEST_CASE("a detached state carries no gradient to earlier layers", "[layers]") {
  for (const bool detach : {false, true}) {
    auto config = everything<double>();
    config.detach_state = detach;
    config.rms_norm = false;
    config.dense_layers = {};
    Trial<double> trial(config);
    test::run(trial, true);
    mole::params::zero(trial.grad);
    mole::Buffer block(trial.scratch_bytes(1));
    mole::Workspace scratch(block.span());
    const mole::Context context{.scratch = scratch};
    const auto& routers = trial.layer.routers();
    const auto& pass = trial.tape.routers;
    routers.begin_backward(pass, trial.dy.col_block(kWidth, kState), trial.d);
    for (Index l = config.layers - 1; l >= 0; --l) {
      const MatView<const double> x{trial.tape.input.row(l).data(), kTokens, kWidth};
      routers.route_backward(l, trial.params.router, pass, {.x = x}, {}, trial.d, {},
                             trial.grad.router, context);
    }
    const auto projection = trial.grad.router.projection;
    const Index early = (config.layers - 1) * kState;
    const auto norm = [](MatView<const double> view) { return test::weighted_sum(view, view); };
    CHECK((norm(projection.row_block(0, early)) == 0) == detach);
    CHECK(norm(projection.row_block(early, kState)) > 0.01);
    CHECK((norm(routers.d_start(trial.d)) == 0) == detach);
  }
}

TEST_CASE("the shared cell is visited once", "[layers]") {
  Trial<double> trial;
  int cells = 0;
  for (const auto& tensor : trial.tensors) cells += tensor.name.starts_with("router.cell.");
  CHECK(cells == 4);
}

TEST_CASE("a stack refuses layers out of order and wrong shapes", "[layers]") {
  using mole::Error;
  Trial<double> trial;
  const auto& routers = trial.layer.routers();
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span()), packing = trial.packing(trial.layer.prepared_bytes());
  const mole::Context context{.scratch = scratch};
  const auto prepared = trial.layer.prepare(trial.weights, packing);
  routers.begin(trial.tape.routers, kTokens);
  const mole::Tokens<double> tokens{.x = trial.x.value};
  CHECK_THROWS_WITH(routers.route(1, prepared.routers, tokens, {}, trial.tape.routers, context),
                    "RecurrentStack: layer 1 of 3 is routed, expected layer 0");
  CHECK_THROWS_AS(routers.begin_backward(trial.tape.routers, {}, trial.d), Error);
  CHECK_THROWS_AS(routers.begin(trial.tape.routers, kTokens + 3), Error);
  CHECK_THROWS_AS(routers.begin(trial.tape.routers, kTokens, trial.x.value), Error);
  auto y = trial.zeros(kTokens, kWidth + 1);
  CHECK_THROWS_AS(trial.layer.forward(prepared, trial.x.value, {}, y, trial.tape, context), Error);
  auto weights = trial.weights;
  weights.base = {};
  mole::Workspace again = trial.packing(trial.layer.prepared_bytes());
  CHECK_THROWS_AS(trial.layer.prepare(weights, again), Error);
  auto config = everything<double>();
  config.base = false;
  CHECK_THROWS_WITH(mole::Rmoe(bank<double>(), config),
                    "Rmoe: dense_layers: expected a base map, got 1");
}

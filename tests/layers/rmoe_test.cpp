// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/rmoe.hpp"

#include <limits>
#include <utility>
#include <vector>

#include "layers/layer_trial.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/optim/adamw.hpp"

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
    const auto prepared = layer.prepare(weights, packing);
    this->packed();
    layer.forward(prepared, x.value, start.value, this->y.col_block(0, kWidth), tape, context);
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

/// The routers alone, whose logits have a bias; y: the logits of all layers, one above the other.
template <class T>
struct RoutersTrial : test::LayerTrial<T> {
  using Stack = mole::RecurrentStack<T>;
  static constexpr Index kCount = 5, kLayers = 2, kExperts = 3;

  RoutersTrial() {
    params = stack.make_params(this->exact(stack.params_bytes()));
    grad = stack.make_params(this->exact(stack.params_bytes()));
    this->adopt(params, grad);
    x = this->input("x", kCount, kWidth);
    this->y = this->zeros(kLayers * kCount, kExperts);
    this->dy = this->normal(kLayers * kCount, kExperts);
    pass = stack.make_pass(this->exact(stack.pass_bytes(kCount, true)), kCount, true);
    d = stack.make_gradient(this->exact(stack.gradient_bytes(kCount)), kCount);
  }
  std::size_t scratch_bytes(int workers) const { return stack.scratch_bytes(kCount, workers); }
  void forward(const mole::Context& context) {
    mole::Workspace packing = this->packing(stack.prepared_bytes());
    const auto prepared = stack.prepare(params, packing);
    this->packed();
    stack.begin(pass, kCount);
    for (Index l = 0; l < kLayers; ++l) {
      stack.route(l, prepared, {.x = x.value}, {}, pass, context);
      mole::rows::copy<T>(pass.tapes[l].logits, this->y.row_block(l * kCount, kCount));
    }
  }
  void backward(const mole::Context& context) {
    stack.begin_backward(pass, {}, d);
    for (Index l = kLayers - 1; l >= 0; --l) {
      mole::rows::copy<T>(this->dy.row_block(l * kCount, kCount), d.tapes[l].logits);
      stack.route_backward(l, params, pass, {.x = x.value}, {}, d, x.gradient, grad, context);
    }
  }

  Stack stack{{.layers = kLayers, .width = kWidth, .experts = kExperts, .state = 2, .bias = true}};
  mole::RecurrentStackParams<T> params, grad;
  typename Stack::Pass pass;
  typename Stack::Gradient d;
  typename test::LayerTrial<T>::Tensor x;
};

}  // namespace

TEST_CASE("routers of a stack whose logits have a bias are differentiated exactly", "[layers]") {
  test::check_gradients<RoutersTrial>();
  test::check_snapshot<RoutersTrial<float>>();
  RoutersTrial<double> trial;
  test::run(trial, false);
  const double before = trial.y(RoutersTrial<double>::kCount, 1);
  trial.params.bias(1, 1) += 8;
  test::run(trial, false);
  CHECK(trial.y(RoutersTrial<double>::kCount, 1) == Approx(before + 8).epsilon(1e-14));
}

TEST_CASE("a recurrent stack keeps what every layer keeps", "[layers]") {
  test::check_layer<Trial>();
  test::check_layer<RawTrial>();
}

TEST_CASE("a stack computes with a copy of its parameters", "[layers]") {
  test::check_snapshot<Trial<double>>();
  test::check_snapshot<RawTrial<float>>();
}

TEST_CASE("a stack with too little scratch has not begun to write", "[layers]") {
  test::check_scratch<Trial<double>>(false);
  test::check_scratch<Trial<double>>(true);
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
  const mole::Tokens<double> fewer{.x = trial.x.value.row_block(0, kTokens - 1)};
  CHECK_THROWS_WITH(routers.route(0, prepared.routers, fewer, {}, trial.tape.routers, context),
                    "RecurrentStack: layer 0 has 18 tokens, the pass began with 19");
  CHECK_THROWS_WITH(routers.balance({}, trial.tape.routers, nullptr, context),
                    "RecurrentStack: the balance loss needs a training pass through all layers");
  CHECK_THROWS_AS(routers.begin_backward(trial.tape.routers, {}, trial.d), Error);
  CHECK_THROWS_AS(routers.begin(trial.tape.routers, kTokens + 3), Error);
  CHECK_THROWS_AS(routers.begin(trial.tape.routers, kTokens, trial.x.value), Error);
  auto y = trial.zeros(kTokens, kWidth + 1);
  CHECK_THROWS_AS(trial.layer.forward(prepared, trial.x.value, {}, y, trial.tape, context), Error);
  auto weights = trial.weights;
  weights.base = {};
  mole::Workspace again = trial.packing(trial.layer.prepared_bytes());
  CHECK_THROWS_AS(trial.layer.prepare(weights, again), Error);
  auto of_routers = trial.params.router;
  of_routers.head.rows -= 5;
  CHECK_THROWS_WITH(routers.prepare(of_routers, again), "head: expected [15, 3], got [10, 3]");
  auto config = everything<double>();
  config.base = false;
  CHECK_THROWS_WITH(mole::Rmoe(bank<double>(), config),
                    "Rmoe: dense_layers: expected a base map, got 1");
}

namespace {

template <class F>
mole::Errc refusal(F&& f) {
  try {
    f();
  } catch (const mole::Error& error) {
    return error.code();
  }
  return mole::Errc{};
}

/// A trial after one way forward and back, its way back begun once more.
struct Begun : Trial<double> {
  using Grad = typename Layer::Params<double>;

  Begun() {
    test::run(*this, true);
    layer.begin_backward(tape, {}, d);
    before = results();
  }
  /// What `call` is refused with; nothing may have been added then.
  template <class F>
  mole::Errc refused(F&& call) {
    const mole::Errc code = refusal(call);
    CHECK(test::bit_difference(results(), before) == "");
    return code;
  }
  mole::Errc backward_with(const Layer::Weights& of, const Grad& to) {
    return refused(
        [&] { layer.backward(of, tape, dy.col_block(0, kWidth), d, x.gradient, to, context); });
  }
  mole::Errc route_backward_with(const Grad& to) {
    return refused([&] {
      layer.routers().route_backward(layer.routers().layers() - 1, weights.router, tape.routers,
                                     {.x = x.value}, {}, d, {}, to.router, context);
    });
  }

  mole::Buffer block{scratch_bytes(1)};
  mole::Workspace scratch{block.span()};
  mole::Context context{.scratch = scratch};
  std::vector<double> before;
};

}  // namespace

TEST_CASE("gradients of a stack with too few layers are refused, not written past", "[layers]") {
  Begun trial;
  const auto check = [&](auto&& spoil) {
    Begun::Grad grad = trial.grad;
    spoil(grad.router);
    CHECK(trial.route_backward_with(grad) == mole::Errc::shape_mismatch);
    CHECK(trial.backward_with(trial.weights, grad) == mole::Errc::shape_mismatch);
  };
  check([](auto& router) { router.projection.rows -= kState; });
  check([](auto& router) { router.head.rows -= 5; });
  check([](auto& router) { router.head.cols -= 1; });
  check([&](auto& router) { router.bias = trial.zeros(3, 5); });  // the config has none
  check([](auto& router) { router.cell.input_weight.rows -= 1; });
  check([](auto& router) { router.cell.hidden_weight.cols -= 1; });
  check([](auto& router) { router.cell.input_bias.cols -= 1; });
  check([&](auto& router) { router.cell.hidden_bias = trial.zeros(2, 3 * kState); });
}

TEST_CASE("a way back through a stack is refused before any gradient", "[layers]") {
  using mole::Errc;
  Begun trial;
  auto weights = trial.weights;
  weights.router.head.rows -= 5;
  CHECK(trial.backward_with(weights, trial.grad) == Errc::shape_mismatch);
  std::vector<mole::LoraBankParams<double>> of_layers(trial.grad.experts.begin(),
                                                      trial.grad.experts.end());
  of_layers[0].out -= 1;
  auto grad = trial.grad;
  grad.experts = of_layers;
  CHECK(trial.backward_with(trial.weights, grad) == Errc::shape_mismatch);
  const auto training = trial.tape;
  trial.tape = trial.layer.make_tape(trial.memory, kTokens, false);
  trial.tape.tokens = kTokens;
  CHECK(trial.backward_with(trial.weights, trial.grad) == Errc::state_error);
  trial.tape = training;
  CHECK(refusal([&] { trial.backward(trial.context); }) == Errc{});
  trial.before = trial.results();
  CHECK(trial.backward_with(trial.weights, trial.grad) == Errc::state_error);  // not begun again
  auto fresh = trial.layer.make_gradient(trial.memory, kTokens);
  std::swap(trial.d, fresh);
  CHECK(trial.backward_with(trial.weights, trial.grad) == Errc::state_error);
}

TEST_CASE("a stack goes back with weights and gradients of its own shapes alone", "[layers]") {
  using mole::Errc;
  Begun trial;
  const auto check = [&](auto&& spoil) {
    auto weights = trial.weights;
    spoil(weights);
    CHECK(trial.backward_with(weights, trial.grad) == Errc::shape_mismatch);
    auto grad = trial.grad;
    spoil(grad);
    CHECK(trial.backward_with(trial.weights, grad) == Errc::shape_mismatch);
  };
  check([](auto& params) { params.norm.cols -= 1; });
  check([](auto& params) { params.base.rows -= kWidth; });
  check([](auto& params) { params.bias.rows -= 1; });
  check([](auto& params) { params.share_gate.rows -= 3; });
  check([](auto& params) { params.share_up.cols -= 1; });
  check([](auto& params) { params.share_down.rows -= kWidth; });
  check([](auto& params) { params.experts = params.experts.first(2); });
  const auto dx = trial.x.gradient, dy = trial.dy;
  trial.x.gradient = dx.row_block(0, kTokens - 1);
  CHECK(trial.backward_with(trial.weights, trial.grad) == Errc::shape_mismatch);
  trial.x.gradient = dx;
  trial.dy = dy.row_block(0, kTokens - 1);
  CHECK(trial.backward_with(trial.weights, trial.grad) == Errc::shape_mismatch);
}

TEST_CASE("routers of a stack go back in order, through the pass that was begun", "[layers]") {
  using mole::Errc;
  Begun trial;
  const auto& routers = trial.layer.routers();
  const auto last = routers.layers() - 1;
  auto pass = trial.tape.routers;
  mole::RecurrentStackParams<const double> params = trial.params.router;
  const auto back = [&](Index layer) {
    return trial.refused([&] {
      routers.route_backward(layer, params, pass, {.x = trial.x.value}, {}, trial.d, {},
                             trial.grad.router, trial.context);
    });
  };
  CHECK(back(last - 1) == Errc::state_error);
  CHECK(back(last + 1) == Errc::state_error);
  pass.tokens -= 1;
  CHECK(back(last) == Errc::state_error);
  pass = trial.tape.routers;
  pass.tapes = {};
  CHECK(back(last) == Errc::state_error);
  pass = trial.tape.routers;
  params.head.rows -= 5;
  CHECK(back(last) == Errc::shape_mismatch);

  const auto begin = [&](MatView<const double> d_last, auto spoil) {
    auto d = trial.d;
    spoil(d);
    return refusal([&] { routers.begin_backward(pass, d_last, d); });
  };
  const auto as_it_is = [](auto&) {};
  const MatView<const double> d_last = trial.dy.col_block(kWidth, kState);
  CHECK(begin(d_last, as_it_is) == Errc{});
  CHECK(begin(d_last.col_block(0, kState - 1), as_it_is) == Errc::shape_mismatch);
  CHECK(begin(d_last, [](auto& d) { d.tapes = d.tapes.first(2); }) == Errc::shape_mismatch);
  CHECK(begin(d_last, [](auto& d) { d.d_state.rows = kTokens - 1; }) == Errc::limit_exceeded);
}

TEST_CASE("a stack without a map writes no gradient of it", "[layers]") {
  auto config = everything<double>();
  config.base = config.out_bias = false;
  config.dense_layers = {};
  Trial<double> trial(config);
  const MatView<double> guard = trial.normal(4, kWidth), kept = trial.zeros(4, kWidth);
  mole::rows::copy<double>(guard, kept);
  trial.grad.base = {guard.data, 0, kWidth};
  trial.grad.bias = {guard.data, 0, kWidth};
  test::run(trial, true);
  CHECK(test::bit_difference(guard, kept) == "");
}

TEST_CASE("experts without a gradient are frozen", "[layers]") {
  Trial<double> trial, moments;
  test::run(trial, true);
  const auto first = moments.params, second = moments.grad;
  mole::params::zero(first);
  mole::params::zero(second);
  auto grad = trial.grad;
  grad.experts = {};
  const double expert = trial.params.experts[0].up_of(0)(0, 0), base = trial.params.base(0, 0);
  mole::adamw_step(trial.params, grad, first, second, {}, 1);
  CHECK(trial.params.experts[0].up_of(0)(0, 0) == expert);
  CHECK(trial.params.base(0, 0) != base);
  mole::adamw_step(trial.params, trial.grad, first, second, {}, 2);
  CHECK(trial.params.experts[0].up_of(0)(0, 0) != expert);
}

TEST_CASE("gradients of a stack hold no memory that nobody reads", "[layers]") {
  constexpr Index kMany = 1000;
  Trial<double> trial;
  const auto& routers = trial.layer.routers();
  const Index layers = routers.layers(), experts = 5, k = 2;
  const auto scalars = static_cast<std::size_t>(kMany * (layers * (2 * experts + k) + 2 * kState));
  CHECK(routers.gradient_bytes(kMany) < scalars * sizeof(double) + 4096);
  for (const auto& tape : trial.d.tapes) CHECK(tape.head.cell.gates.data == nullptr);
}

TEST_CASE("sizes of stacks that no machine has stay large", "[layers]") {
  constexpr std::size_t kHuge = std::size_t{1} << 56;
  auto config = everything<double>();
  // So many layers that the product with what each needs, added to what else there is, wraps.
  const auto layers = [](std::size_t each, std::size_t rest) {
    return static_cast<Index>((0 - rest) / each + 1);
  };
  const mole::Rmoe small(bank<double>(), config);
  config.dense_layers = {};
  config.layers = layers(small.routers().router().tape_bytes(kTokens), kHuge);
  CHECK(mole::Rmoe(bank<double>(), config).routers().gradient_bytes(kTokens) >= kHuge);
  config.layers = layers(small.experts().params_bytes<double>(), 2 * kHuge);
  CHECK(mole::Rmoe(bank<double>(), config).params_bytes() >= kHuge);
}

TEST_CASE("a stack refuses weights of its parts that are no numbers", "[layers]") {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  auto config = everything<double>();
  config.norm_epsilon = kInfinity;
  CHECK_THROWS_WITH(mole::Rmoe(bank<double>(), config),
                    "Rmoe: norm_epsilon: expected a number from 0 up, got inf");
  config = everything<double>();
  config.moe_weight = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_WITH(mole::Rmoe(bank<double>(), config),
                    "Rmoe: moe_weight: expected a finite number, got nan");
  config = everything<double>();
  config.share_weight = kInfinity;
  CHECK_THROWS_WITH(mole::Rmoe(bank<double>(), config),
                    "Rmoe: share_weight: expected a finite number, got inf");
}

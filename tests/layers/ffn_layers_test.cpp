// SPDX-License-Identifier: Apache-2.0
// Layers of feed-forward experts: AdaptedFfn, PassThrough, and a mixture of FfnBank experts.
#include <cmath>
#include <string>
#include <vector>

#include "layers/layer_trial.hpp"
#include "mole/experts/ffn_bank.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/layers/adapted_ffn.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/layers/pass_through.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/hard_top_k.hpp"
#include "mole/routers/switch.hpp"
#include "mole/routers/top_k.hpp"
#include "mole/routers/unit.hpp"
#include "support/compare.hpp"

namespace {

using Catch::Matchers::ContainsSubstring;
using mole::Activation;
using mole::Index;
using mole::MatView;

constexpr Index kTokens = 19, kIn = 7, kInner = 11, kOut = 5, kExperts = 4;

template <class T>
mole::LoraBank<T> lora(Index in, Index out) {
  return mole::LoraBank<T>(
      {.in = in, .out = out, .rank = {2, 0, 3, 1}, .scale = {T(1), T(1), T(-0.5), T(2)}});
}

template <class T>
typename mole::FfnBank<T>::Config ffn(Index in, Index out, mole::ExpertBase base) {
  typename mole::FfnBank<T>::Config config;
  config.in = in;
  config.inner = kInner;
  config.out = out;
  config.experts = kExperts;
  config.base = base;
  config.outer_bias = true;
  config.up = {{2, 0, 3, 1}, {T(1), T(1), T(-0.5), T(2)}};
  return config;
}

/// Common to the layers: parameters, an input of their router's liking, both directions.
template <class T, class L>
struct Trial : test::LayerTrial<T> {
  using Layer = L;
  using Params = typename Layer::template Params<T>;
  using Tensor = typename test::LayerTrial<T>::Tensor;

  explicit Trial(Layer of) : layer(std::move(of)) {}
  virtual ~Trial() = default;

  void start(const Params& values, const Params& gradients) {
    params = values;
    grad = gradients;
    this->adopt(params, grad);
    x = this->input("x", kTokens, layer.input_width());
    this->y = this->zeros(kTokens, layer.output_width());
    this->dy = this->normal(kTokens, layer.output_width());
    tape = layer.make_tape(this->exact(layer.tape_bytes(kTokens + 2)), kTokens + 2);
    d_tape =
        layer.router().make_tape(this->exact(layer.router().tape_bytes(kTokens + 2)), kTokens + 2);
  }
  mole::LayerInput<T> layer_input() const {
    mole::LayerInput<T> made(x.value);
    made.sequence_begin = sequences;
    made.router_x = router_x;
    return made;
  }
  std::size_t scratch_bytes(int workers) const { return layer.scratch_bytes(kTokens, workers); }
  void forward(const mole::Context& context) {
    mole::Workspace packing = this->packing(layer.prepared_bytes());
    std::fill_n(this->y.data, this->y.size(), T(0));
    layer.forward(layer.prepare(weights(), packing), {}, layer_input(), {}, this->y, {}, &tape,
                  context);
  }
  void backward(const mole::Context& context) {
    mole::params::zero(d_tape);
    layer.backward(weights(), {}, tape, layer_input(), {}, this->dy, d_tape, {}, {.x = x.gradient},
                   grad, {}, context);
  }
  std::vector<T> inferred() {
    mole::Buffer block(scratch_bytes(1));
    mole::Workspace scratch(block.span()), packing = this->packing(layer.prepared_bytes());
    std::vector<T> y(static_cast<std::size_t>(this->y.size()));
    layer.forward(layer.prepare(weights(), packing), {}, layer_input(), {},
                  {y.data(), this->y.rows, this->y.cols}, {}, nullptr, mole::Context{scratch});
    return y;
  }
  virtual typename Layer::Weights weights() const = 0;

  Layer layer;
  Params params, grad;
  Tensor x;
  typename Layer::Tape tape;
  typename Layer::RouterTape d_tape;
  std::vector<std::int32_t> sequences = {};
  MatView<const T> router_x = {};
};

/// Every projection adapted, with biases.
template <class T>
struct AdaptedTrial : Trial<T, mole::AdaptedFfn<mole::DenseRouter<T>, mole::LoraBank<T>>> {
  using Layer = mole::AdaptedFfn<mole::DenseRouter<T>, mole::LoraBank<T>>;
  using Params = typename Layer::template Params<T>;

  AdaptedTrial()
      : AdaptedTrial({lora<T>(kIn, kInner), lora<T>(kIn, kInner), lora<T>(kInner, kOut)}) {}
  explicit AdaptedTrial(std::vector<mole::LoraBank<T>> banks)
      : Trial<T, Layer>(Layer(mole::DenseRouter<T>({.width = kIn, .experts = kExperts}),
                              std::move(banks), Activation::gelu)) {
    this->start(make(), make());
  }
  Params make() {
    Params made;
    made.router = this->layer.router().make_params(this->memory);
    for (std::size_t m = this->layer.has_gate() ? 0 : 1; m < 3; ++m) {
      const auto& bank = this->layer.experts(static_cast<typename Layer::Matrix>(m));
      made.matrix[m].weight = this->zeros(bank.output_width(), bank.input_width());
      made.matrix[m].bias = this->zeros(1, bank.output_width());
      made.matrix[m].experts = bank.template make_params<T>(this->memory);
    }
    mole::params::zero(made);
    return made;
  }
  typename Layer::Weights weights() const override {
    typename Layer::Weights made;
    made.router = this->params.router;
    for (std::size_t m = 0; m < 3; ++m) {
      const auto& from = this->params.matrix[m];
      made.matrix[m] = {from.weight, from.bias, from.experts};
    }
    return made;
  }
};

/// Two matrices, no gate.
template <class T>
struct PlainTrial : AdaptedTrial<T> {
  PlainTrial() : AdaptedTrial<T>({lora<T>(kIn, kInner), lora<T>(kInner, kOut)}) {}
};

/// Experts of rank 1 in `down`: the first bank on the way back needs the least scratch.
template <class T>
struct ThinDownTrial : AdaptedTrial<T> {
  ThinDownTrial()
      : AdaptedTrial<T>({lora<T>(kIn, kInner), lora<T>(kIn, kInner),
                         mole::LoraBank<T>({.in = kInner,
                                            .out = kOut,
                                            .rank = {1, 0, 1, 1},
                                            .scale = {T(1), T(1), T(1), T(1)}})}) {}
};

template <class T, class L>
struct MixtureTrial : Trial<T, L> {
  explicit MixtureTrial(L layer) : Trial<T, L>(std::move(layer)) { this->start(make(), make()); }
  typename L::template Params<T> make() {
    typename L::template Params<T> made;
    made.router = this->layer.router().make_params(this->memory);
    made.experts = this->layer.experts().template make_params<T>(this->memory);
    mole::params::zero(made);
    return made;
  }
  typename L::Weights weights() const override {
    return {this->params.router, this->params.experts};
  }
};

template <class T>
using TopKFfn = mole::Mixture<mole::TopKRouter<T>, mole::FfnBank<T>>;
template <class T>
using Passing = mole::PassThrough<mole::Mixture<mole::SwitchRouter<T>, mole::FfnBank<T>>>;

template <class T>
struct SharedTrial : MixtureTrial<T, TopKFfn<T>> {
  SharedTrial()
      : MixtureTrial<T, TopKFfn<T>>(
            TopKFfn<T>(mole::TopKRouter<T>({.width = kIn, .experts = kExperts, .probes = true}),
                       mole::FfnBank<T>(ffn<T>(kIn, kOut, mole::ExpertBase::shared)))) {}
};

/// Two sequences, and experts that take one token of each: many tokens pass through.
template <class T>
struct PassingTrial : MixtureTrial<T, Passing<T>> {
  PassingTrial()
      : MixtureTrial<T, Passing<T>>(
            Passing<T>({mole::SwitchRouter<T>({.width = kIn, .experts = kExperts, .capacity = 1}),
                        mole::FfnBank<T>(ffn<T>(kIn, kIn, mole::ExpertBase::own))})) {
    this->sequences = {0, 8, kTokens};
  }
};

template <class F>
std::string refusal(F&& f) {
  try {
    f();
  } catch (const mole::Error& error) {
    return error.what();
  }
  return "accepted";
}

}  // namespace

TEST_CASE("a mixture of feed-forward experts is differentiated exactly", "[layers]") {
  test::check_layer<SharedTrial>();
}

TEST_CASE("AdaptedFfn is differentiated exactly, without allocation, on any workers",
          "[layers][threads]") {
  test::check_layer<AdaptedTrial>();
  test::check_layer<PlainTrial>();
}

TEST_CASE("PassThrough is differentiated exactly, without allocation, on any workers",
          "[layers][threads]") {
  test::check_layer<PassingTrial>();
}

TEMPLATE_TEST_CASE("a tape changes no bit of feed-forward layers", "[layers]", float, double) {
  const auto check = [](auto&& trial) {
    test::run(trial, false);
    CHECK(test::bit_difference(std::vector<TestType>(trial.y.data, trial.y.data + trial.y.size()),
                               trial.inferred()) == "");
  };
  check(SharedTrial<TestType>());
  check(AdaptedTrial<TestType>());
  check(PlainTrial<TestType>());
  check(PassingTrial<TestType>());
}

TEST_CASE("PassThrough adds the scaled token where the mixture adds nothing", "[layers]") {
  PassingTrial<double> trial;
  test::run(trial, false);
  const auto routing = trial.tape.routing.view();
  Index left_out = 0;
  for (Index t = 0; t < kTokens; ++t) {
    if (routing.token_begin[t] != routing.token_begin[t + 1]) continue;
    ++left_out;
    const auto prob = trial.tape.router.prob.row(t);
    const double largest = *std::max_element(prob.begin(), prob.end());
    for (Index i = 0; i < kIn; ++i) {
      CHECK(trial.y(t, i) == Approx(largest * trial.x.value(t, i)).epsilon(1e-14));
    }
  }
  CHECK(left_out >= kTokens - 2 * kExperts);
  CHECK(left_out < kTokens);
}

TEST_CASE("with one expert a token AdaptedFfn is a mixture of blocks", "[layers]") {
  using T = double;
  using Router = mole::HardTopKRouter<T>;
  using Adapted = mole::AdaptedFfn<Router, mole::LoraBank<T>>;
  using Blocks = mole::Mixture<Router, mole::FfnBank<T>>;
  const Router router({.width = kIn, .experts = kExperts});
  auto config = ffn<T>(kIn, kOut, mole::ExpertBase::shared);
  config.gate = config.down = config.up;
  const Blocks blocks(router, mole::FfnBank<T>(config));
  const Adapted adapted(router,
                        {lora<T>(kIn, kInner), lora<T>(kIn, kInner), lora<T>(kInner, kOut)});

  test::LayerTrial<T> trial;
  auto params = blocks.experts().template make_params<T>(trial.memory);
  const auto head = router.make_params(trial.memory);
  mole::params::zip([&](T& value) { value = 0; }, params);
  trial.adopt(params, params);
  trial.fill(head.weight, 1);
  const MatView<T> x = trial.normal(kTokens, kIn);
  const MatView<T> y = trial.zeros(kTokens, kOut), twin = trial.zeros(kTokens, kOut);
  typename Adapted::Weights weights;
  weights.router = head;
  const mole::LinearBankParams<T>* of[] = {&params.gate, &params.up, &params.down};
  for (std::size_t m = 0; m < 3; ++m) {
    weights.matrix[m] = {of[m]->weight_of(0), of[m]->bias_of(0), of[m]->adapter};
  }
  mole::Buffer block(std::size_t{1} << 20);
  mole::Workspace scratch(block.span());
  const mole::Context context{scratch};
  blocks.forward(blocks.prepare({head, params}, trial.memory), x, y, nullptr, context);
  adapted.forward(adapted.prepare(weights, trial.memory), {}, x, {}, twin, {}, nullptr, context);
  CHECK(test::difference(twin, y, {1e-12, 1e-12}) == "");
}

TEST_CASE("frozen experts: x learns from the logits alone", "[layers]") {
  SharedTrial<double> trial;
  test::run(trial, true);
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span());
  const mole::Context context{scratch};
  auto input = trial.layer_input();
  input.router_x = input.x;
  const MatView<double> through_router = trial.zeros(kTokens, kIn);
  const MatView<double> through_experts = trial.zeros(kTokens, kIn);
  typename SharedTrial<double>::Params none = trial.grad;
  none.experts = {};
  const auto backward = [&](const mole::LayerInputGradient<double>& d_input) {
    mole::params::zero(trial.d_tape);
    trial.layer.backward(trial.weights(), {}, trial.tape, input, {}, trial.dy, trial.d_tape, {},
                         d_input, none, {}, context);
  };
  backward({.router_x = through_router});
  backward({.x = through_experts});
  const test::Matrix<double> sum(
      kTokens, kIn, [&](Index t, Index i) { return through_router(t, i) + through_experts(t, i); });
  CHECK(test::difference(sum, trial.x.gradient, {1e-12, 1e-12}) == "");
  CHECK(mole::params::norm(mole::LinearParams<double>{through_router, {}}) > 0.01);
}

TEST_CASE("feed-forward layers refuse what does not fit", "[layers]") {
  using T = double;
  using Layer = AdaptedTrial<T>::Layer;
  const mole::DenseRouter<T> router({.width = kIn, .experts = kExperts});
  const auto in = lora<T>(kIn, kInner), out = lora<T>(kInner, kOut);
  CHECK(refusal([&] { Layer(router, {in, in, out}); }) == "accepted");
  CHECK_THAT(refusal([&] { Layer(router, {out}); }),
             ContainsSubstring("expected banks of gate, up and down, or of up and down, got 1"));
  CHECK_THAT(refusal([&] {
               Layer(router, {in, lora<T>(kIn, kInner + 1), out});
             }),
             ContainsSubstring("AdaptedFfn: gate and up: expected 7 -> 11, got 7 -> 12"));
  CHECK_THAT(refusal([&] {
               Layer(mole::DenseRouter<T>({.width = kIn, .experts = 3}), {in, in, out});
             }),
             ContainsSubstring("the router has 3 experts, a bank has 4"));
  CHECK_THAT(refusal([&] {
               Passing<T>({mole::SwitchRouter<T>({.width = kIn, .experts = kExperts}),
                           mole::FfnBank<T>(ffn<T>(kIn, kOut, mole::ExpertBase::own))});
             }),
             ContainsSubstring("the mixture is 7 wide at its input and 5 at its output"));

  AdaptedTrial<T> trial;
  test::run(trial, false);
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span()), packing = trial.packing(trial.layer.prepared_bytes());
  const auto prepared = trial.layer.prepare(trial.weights(), packing);
  const auto forward = [&](MatView<const T> x, MatView<T> y) {
    trial.layer.forward(prepared, {}, x, {}, y, {}, nullptr, mole::Context{scratch});
  };
  const MatView<T> x = trial.x.value, y = trial.y;
  CHECK_THAT(refusal([&] { forward(x.col_block(0, kIn - 1), y); }),
             ContainsSubstring("x: expected [19, 7], got [19, 6]"));
  CHECK_THAT(refusal([&] { forward(x, y.row_block(0, kTokens - 1)); }),
             ContainsSubstring("y: expected [19, 5], got [18, 5]"));
  auto weights = trial.weights();
  weights.matrix[Layer::kDown].weight.rows -= 1;
  CHECK_THAT(refusal([&] { trial.layer.prepare(weights, packing); }),
             ContainsSubstring("down: expected [5, 11], got [4, 11]"));
  mole::LayerInput<T> narrow(x.col_block(0, kIn - 1)), dropped(x);
  narrow.router_x = x;
  CHECK_THAT(refusal([&] {
               trial.layer.forward(prepared, {}, narrow, {}, y, {}, nullptr,
                                   mole::Context{scratch});
             }),
             ContainsSubstring("x: expected [19, 7], got [19, 6]"));
  dropped.dropout = x;
  CHECK_THAT(refusal([&] {
               trial.layer.forward(prepared, {}, dropped, {}, y, {}, nullptr,
                                   mole::Context{scratch});
             }),
             ContainsSubstring("AdaptedFfn: dropout"));
}

TEST_CASE("PassThrough refuses a router without scores", "[layers]") {
  using Unit = mole::Mixture<mole::UnitRouter<double>, mole::LoraBank<double>>;
  const Unit mixture(mole::UnitRouter<double>({.width = kIn, .experts = kExperts}),
                     lora<double>(kIn, kIn));
  CHECK_THAT(refusal([&] { mole::PassThrough<Unit>{mixture}; }),
             ContainsSubstring("PassThrough: the router keeps no scores of the experts"));
}

TEST_CASE("AdaptedFfn with too little scratch has not begun to write", "[layers]") {
  test::check_scratch<AdaptedTrial<double>>(true);
  test::check_scratch<ThinDownTrial<double>>(true);
  AdaptedTrial<double> trial;
  mole::Workspace packing = trial.packing(trial.layer.prepared_bytes());
  const auto prepared = trial.layer.prepare(trial.weights(), packing);
  const std::size_t enough = trial.scratch_bytes(1);
  trial.fill(trial.y, 1);
  const std::vector<double> before = trial.results();
  for (const bool recorded : {false, true}) {
    int refused = 0;
    for (std::size_t bytes = 0; bytes + mole::kAlignment < enough; bytes += enough / 97) {
      mole::Buffer block(bytes);
      mole::Workspace scratch(block.span());
      refused += refusal([&] {
                   trial.layer.forward(prepared, {}, trial.layer_input(), {}, trial.y, {},
                                       recorded ? &trial.tape : nullptr, mole::Context{scratch});
                 }).starts_with("scratch: ");
      REQUIRE(test::bit_difference(trial.results(), before) == "");
    }
    CHECK(refused > 90);
  }
}

TEST_CASE("AdaptedFfn refuses to go back before it has added anything", "[layers]") {
  using Layer = AdaptedTrial<double>::Layer;
  AdaptedTrial<double> trial;
  test::run(trial, true);
  const std::vector<double> before = trial.results();
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span());
  const auto refused = [&] {
    const std::string text = refusal([&] { trial.backward(mole::Context{scratch}); });
    CHECK(test::bit_difference(trial.results(), before) == "");
    const MatView<double> gate = trial.d_tape.gate, logits = trial.d_tape.logits;
    CHECK(test::weighted_sum(gate, gate) == 0);
    CHECK(test::weighted_sum(logits, logits) == 0);
    return text;
  };
  for (const auto matrix : {Layer::kGate, Layer::kUp, Layer::kDown}) {
    trial.grad.matrix[matrix].experts.out += 1;
    CHECK_THAT(refused(), ContainsSubstring("LoraBank gradient: expected"));
    trial.grad.matrix[matrix].experts.out -= 1;
    for (auto* params : {&trial.params, &trial.grad}) {
      const auto good = params->matrix[matrix];
      params->matrix[matrix].weight.rows -= 1;
      CHECK_THAT(refused(), ContainsSubstring(std::string(Layer::kNames[matrix]) + ": expected ["));
      params->matrix[matrix] = good;
      params->matrix[matrix].bias.cols -= 1;
      CHECK_THAT(refused(), ContainsSubstring(std::string(Layer::kNames[matrix]) + ": expected ["));
      params->matrix[matrix] = good;
    }
  }
  trial.grad.router.weight.rows -= 1;
  CHECK_THAT(refused(), ContainsSubstring("grad.weight: expected [4, 7], got [3, 7]"));
  trial.grad.router.weight.rows += 1;
  const MatView<double> dx = trial.x.gradient, dy = trial.dy;
  trial.x.gradient = trial.x.value;
  CHECK_THAT(refused(), ContainsSubstring("dx: overlaps x"));
  trial.x.gradient = dx;
  trial.dy = dy.col_block(0, kOut - 1);
  CHECK_THAT(refused(), ContainsSubstring("dy: expected [19, 5], got [19, 4]"));
  trial.dy = dx.col_block(0, kOut);
  CHECK_THAT(refused(), ContainsSubstring("dx: overlaps dy"));
  trial.dy = dy;
  trial.x.gradient = dx.row_block(0, kTokens - 1);
  CHECK_THAT(refused(), ContainsSubstring("dx: expected [19, 7], got [18, 7]"));
  const MatView<double> x = trial.x.value;
  trial.router_x = x;
  CHECK_THAT(refused(), ContainsSubstring("dx: expected [19, 7], got [18, 7]"));
  trial.router_x = {};
  trial.x.gradient = dx;
  trial.x.value = x.row_block(0, kTokens - 1);
  trial.dy = dy.row_block(0, kTokens - 1);
  CHECK_THAT(refused(), ContainsSubstring("x: expected [19, 7], got [18, 7]"));
  trial.x.value = x;
  trial.dy = dy;
  CHECK(refusal([&] { trial.backward(mole::Context{scratch}); }) == "accepted");
}

TEST_CASE("PassThrough that refuses to go back leaves the gradient of the scores", "[layers]") {
  PassingTrial<double> trial;
  test::run(trial, false);
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span()), none;
  const auto check = [&](mole::Workspace& memory, bool accepted) {
    const std::string text = refusal([&] { trial.backward(mole::Context{memory}); });
    CHECK((text == "accepted") == accepted);
    const MatView<double> prob = trial.d_tape.prob;
    CHECK((test::weighted_sum(prob, prob) == 0) == !accepted);
  };
  check(none, false);
  trial.grad.router.weight.rows -= 1;
  check(scratch, false);
  trial.grad.router.weight.rows += 1;
  trial.grad.experts.up.in += 1;
  check(scratch, false);
  trial.grad.experts.up.in -= 1;
  trial.d_tape.prob.rows = kTokens - 1;
  CHECK_THAT(refusal([&] { trial.backward(mole::Context{scratch}); }),
             ContainsSubstring("d_tape.prob: expected [19, 4], got [18, 4]"));
  trial.d_tape.prob.rows = kTokens + 2;
  check(scratch, true);
}

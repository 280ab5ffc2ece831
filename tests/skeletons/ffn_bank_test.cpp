// SPDX-License-Identifier: Apache-2.0
#include "skeletons/ffn_bank.hpp"

#include <cmath>
#include <vector>

#include "mole/layers/mixture.hpp"
#include "mole/losses/balance.hpp"
#include "mole/routers/given.hpp"
#include "mole/routers/top_k.hpp"
#include "skeletons/golden_case.hpp"
#include "skeletons/support.hpp"
#include "support/catch.hpp"

namespace skeleton {

namespace {

using Bank = FfnBank<double>;
using Router = mole::TopKRouter<double>;
using Layer = mole::Mixture<Router, Bank>;

/// The adapters of one projection; without any, rank 0.
std::vector<Index> ranks_of(const GoldenCase& c, const std::string& projection, Index experts) {
  const bool adapted = c.has("param." + projection + ".A");
  return std::vector<Index>(static_cast<std::size_t>(experts),
                            adapted ? static_cast<Index>(c.number("r")) : 0);
}

void load(const GoldenCase& c, const std::string& projection,
          const mole::LoraBankParams<double>& to) {
  for (Index e = 0; c.has("param." + projection + ".A") && e < c.extent("param.router.weight", 0);
       ++e) {
    add(to.down_of(e), c.slice("param." + projection + ".A", e));
    add(to.up_of(e), c.slice("param." + projection + ".B", e));
  }
}

void check_gradient(const GoldenCase& c, const std::string& projection,
                    const mole::LoraBankParams<double>& got) {
  const std::string name = "grad.param." + projection;
  for (Index e = 0; c.has(name + ".A") && e < c.extent("param.router.weight", 0); ++e) {
    CHECK(c.slice_difference(name + ".A", e, got.down_of(e)) == "");
    CHECK(c.slice_difference(name + ".B", e, got.up_of(e)) == "");
  }
}

}  // namespace

TEST_CASE("feed-forward experts behind one routing give the golden values", "[skeletons]") {
  const std::string name = GENERATE(from_range(GoldenCase::names("layer.mixlora__")));
  INFO(name);
  const GoldenCase c(name);
  Memory memory;
  const MatView<const double> x = c.matrix("in.x");
  const Index experts = c.extent("param.router.weight", 0);
  const double r = c.number("r");
  const Bank bank(
      {.width = x.cols,
       .inner = c.extent("param.gate_proj.weight", 0),
       .gate_rank = ranks_of(c, "gate_proj", experts),
       .up_rank = ranks_of(c, "up_proj", experts),
       .down_rank = ranks_of(c, "down_proj", experts),
       .scale = c.number("alpha") / (c.text("scaling") == "alpha/r" ? r : std::sqrt(r))});
  const Layer layer(
      Router({.width = x.cols, .experts = experts, .k = static_cast<Index>(c.number("k"))}), bank);
  const auto adapters = bank.make_params<double>(memory.workspace());
  Bank::Weights bank_weights = adapters;
  bank_weights.frozen_gate = c.matrix("param.gate_proj.weight");
  bank_weights.frozen_up = c.matrix("param.up_proj.weight");
  bank_weights.frozen_down = c.matrix("param.down_proj.weight");
  const Layer::Params<double> grad{{memory.zeros(experts, x.cols), {}},
                                   bank.make_params<double>(memory.workspace())};
  mole::params::zero(adapters);
  mole::params::zero(grad);
  load(c, "gate_proj", adapters.gate);
  load(c, "up_proj", adapters.up);
  load(c, "down_proj", adapters.down);
  const Layer::Weights weights{{c.matrix("param.router.weight"), {}}, bank_weights};
  auto tape = layer.make_tape(memory.workspace(), x.rows);
  const auto d_tape = layer.router().make_tape(memory.workspace(), x.rows);
  mole::params::zero(d_tape);
  const MatView<double> y = memory.zeros(x.rows, x.cols), dx = memory.zeros(x.rows, x.cols);
  layer.forward(layer.prepare(weights, memory.workspace()), x, y, &tape, memory.context());
  if (c.text("aux") == "lb_k") {
    const double weight = c.number("loss_weight");
    const double loss = mole::balance_loss<double>({.weight = weight}, tape.routing.view(),
                                                   tape.router.prob, d_tape.prob, memory.context());
    const std::vector<double> value = {loss / weight};
    CHECK(c.difference("out.loss", {value.data(), 1, 1}) == "");
  }
  layer.backward(weights, tape, x, c.matrix("in.dy"), d_tape, {.x = dx}, grad, memory.context());
  CHECK(c.difference("out.y", y) == "");
  CHECK(c.difference("grad.in.x", dx) == "");
  CHECK(c.difference("grad.param.router.weight", grad.router.weight) == "");
  check_gradient(c, "gate_proj", grad.experts.gate);
  check_gradient(c, "up_proj", grad.experts.up);
  check_gradient(c, "down_proj", grad.experts.down);
}

TEST_CASE("every gradient of feed-forward experts agrees with differences", "[skeletons]") {
  constexpr Index kTokens = 5, kWidth = 3, kInner = 7;
  const Bank bank({.width = kWidth,
                   .inner = kInner,
                   .gate_rank = {2, 0, 1, 3},
                   .up_rank = {1, 2, 0, 2},
                   .down_rank = {2, 1, 3, 0},
                   .scale = 1.5});
  const bool probes = GENERATE(false, true);
  const Layer layer(Router({.width = kWidth, .experts = 4, .k = 2, .probes = probes}), bank);
  Memory memory(23);
  memory.limit_scratch(layer.scratch_bytes(kTokens, 1));
  const Layer::Params<double> params{{memory.random(4, kWidth), {}},
                                     bank.make_params<double>(memory.workspace())};
  const Layer::Params<double> grad{{memory.zeros(4, kWidth), {}},
                                   bank.make_params<double>(memory.workspace())};
  memory.fill_params(params.experts);
  memory.fill(params.experts.frozen_gate);
  memory.fill(params.experts.frozen_up);
  memory.fill(params.experts.frozen_down);
  mole::params::zero(grad.experts);
  const Layer::Weights weights{params.router, params.experts};
  const MatView<double> x = memory.random(kTokens, kWidth), dy = memory.random(kTokens, kWidth);
  auto tape = layer.make_tape(memory.workspace(), kTokens);
  const auto forward = [&](Layer::Tape* to) {
    const MatView<double> y = memory.zeros(kTokens, kWidth);
    const auto prepared = layer.prepare(weights, memory.workspace());
    layer.forward(prepared, x, y, to, memory.context());
    return y;
  };
  const auto loss = [&] {
    const mole::Workspace::Frame frame(memory.workspace());
    return weighted_sum(forward(&tape), dy);
  };
  loss();
  CHECK(weighted_sum(forward(nullptr), dy) == loss());
  const auto d_tape = layer.router().make_tape(memory.workspace(), kTokens);
  mole::params::zero(d_tape);
  const MatView<double> dx = memory.zeros(kTokens, kWidth);
  layer.backward(weights, tape, x, dy, d_tape, {.x = dx}, grad, memory.context());
  CHECK(params_gradient_error(params, grad, loss) == "");
  CHECK(gradient_error("x", x, dx, loss) == "");
}

TEST_CASE("the gate of a feed-forward expert has a gradient where it is 0", "[skeletons]") {
  constexpr Index kTokens = 3, kWidth = 5, kInner = 4;
  const Bank bank({.width = kWidth,
                   .inner = kInner,
                   .gate_rank = {2, 1},
                   .up_rank = {1, 2},
                   .down_rank = {2, 1}});
  const mole::Mixture<mole::GivenRouter<double>, Bank> layer(
      mole::GivenRouter<double>({.width = kWidth, .experts = 2}), bank);
  Memory memory(29);
  const auto params = bank.make_params<double>(memory.workspace());
  const auto grad = bank.make_params<double>(memory.workspace());
  memory.fill_params(params);
  mole::params::zero(grad);
  const MatView<double> gates = memory.random(kTokens, 2), dy = memory.random(kTokens, kWidth);
  gates(0, 0) = gates(2, 0) = gates(2, 1) = 0;
  mole::LayerInput<double> input = memory.random(kTokens, kWidth);
  input.overrides.gates = gates;
  auto tape = layer.make_tape(memory.workspace(), kTokens);
  const auto loss = [&] {
    const mole::Workspace::Frame frame(memory.workspace());
    const MatView<double> y = memory.zeros(kTokens, kWidth);
    layer.forward(layer.prepare({{}, params}, memory.workspace()), input, y, &tape,
                  memory.context());
    return weighted_sum(y, dy);
  };
  loss();
  const auto d_tape = layer.router().make_tape(memory.workspace(), kTokens);
  mole::params::zero(d_tape);
  layer.backward({{}, params}, tape, input, dy, d_tape, {}, {{}, grad}, memory.context());
  CHECK(gradient_error("gates", gates, d_tape.prob, loss) == "");
}

}  // namespace skeleton

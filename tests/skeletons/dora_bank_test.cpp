// SPDX-License-Identifier: Apache-2.0
#include "skeletons/dora_bank.hpp"

#include <vector>

#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/routers/given.hpp"
#include "skeletons/golden_case.hpp"
#include "skeletons/support.hpp"
#include "support/catch.hpp"

namespace skeleton {

namespace {

using Bank = DoraBank<double>;
using Router = mole::GivenRouter<double>;
using Layer = mole::AdaptedLinear<mole::Mixture<Router, Bank>>;
using Params = Layer::Params<double>;

/// Everything zero.
Params make_params(Memory& memory, const Bank& bank) {
  const Params params{memory.zeros(bank.output_width(), bank.input_width()),
                      memory.zeros(1, bank.output_width()),
                      {{}, bank.make_params<double>(memory.workspace())}};
  mole::params::zero(params);
  return params;
}

Layer::Weights weights_of(const Params& params) {
  return {params.weight, params.bias, {{}, params.mixture.experts}};
}

}  // namespace

TEST_CASE("experts that act on the base product give the golden values", "[skeletons]") {
  const std::string name = GENERATE(from_range(GoldenCase::names("layer.dora_mixture__")));
  INFO(name);
  const GoldenCase c(name);
  Memory memory;
  const MatView<const double> x = c.matrix("in.x");
  const Index experts = c.extent("param.A", 0), out = c.extent("param.B", 1);
  const auto count = static_cast<std::size_t>(experts);
  const Bank bank({.in = x.cols,
                   .out = out,
                   .rank = std::vector<Index>(count, static_cast<Index>(c.number("rank"))),
                   .scale = std::vector<double>(count, c.number("scale"))});
  const Layer layer({Router({.width = x.cols, .experts = experts}), bank});
  const Params params = make_params(memory, bank), grad = make_params(memory, bank);
  auto& dora = params.mixture.experts;
  add(params.weight, c.matrix("param.weight"));
  if (c.has("param.bias")) add(params.bias, c.matrix("param.bias"));
  add(dora.magnitude, c.matrix("param.magnitude"));
  for (Index e = 0; e < experts; ++e) {
    add(dora.lora.down_of(e), c.slice("param.A", e));
    add(dora.lora.up_of(e), c.slice("param.B", e));
  }
  bank.norm(params.weight, dora, dora.norm);
  CHECK(c.difference("out.norm", dora.norm) == "");

  mole::LayerInput<double> input = x;
  input.overrides.gates = c.matrix("in.gate");
  auto tape = layer.make_tape(memory.workspace(), x.rows);
  const auto d_tape = layer.router().make_tape(memory.workspace(), x.rows);
  mole::params::zero(d_tape);
  const MatView<double> y = memory.zeros(x.rows, out), dx = memory.zeros(x.rows, x.cols);
  const Layer::Weights weights = weights_of(params);
  layer.forward(layer.prepare(weights, memory.workspace()), input, y, &tape, memory.context());
  layer.backward(weights, tape, input, c.matrix("in.dy"), d_tape, {.x = dx}, grad,
                 memory.context());
  CHECK(c.difference("out.y", y) == "");
  CHECK(c.difference("grad.in.x", dx) == "");
  CHECK(c.difference("grad.in.gate", d_tape.prob) == "");
  const auto& d_dora = grad.mixture.experts;
  CHECK(c.difference("grad.param.magnitude", d_dora.magnitude) == "");
  for (Index e = 0; e < experts; ++e) {
    CHECK(c.slice_difference("grad.param.A", e, d_dora.lora.down_of(e)) == "");
    CHECK(c.slice_difference("grad.param.B", e, d_dora.lora.up_of(e)) == "");
  }
}

TEST_CASE("with constant norms every gradient agrees with differences, the base weight's too",
          "[skeletons]") {
  constexpr Index kTokens = 5, kIn = 7, kOut = 3;
  const Bank bank({.in = kIn, .out = kOut, .rank = {2, 0, 3, 1}, .scale = {2, 1, 0.5, 1}});
  const Layer layer({Router({.width = kIn, .experts = 4}), bank});
  Memory memory(5);
  memory.limit_scratch(layer.scratch_bytes(kTokens, 1));
  const Params params = make_params(memory, bank), grad = make_params(memory, bank);
  memory.fill_params(params);
  bank.norm(params.weight, params.mixture.experts, params.mixture.experts.norm);
  const Layer::Weights weights = weights_of(params);
  const MatView<double> gates = memory.random(kTokens, 4);
  gates(2, 1) = 0;
  for (Index e = 0; e < 4; ++e) gates(3, e) = 0;
  const MatView<double> x = memory.random(kTokens, kIn), dy = memory.random(kTokens, kOut);
  mole::LayerInput<double> input = x;
  input.overrides.gates = gates;
  auto tape = layer.make_tape(memory.workspace(), kTokens);
  const auto loss = [&] {
    const mole::Workspace::Frame frame(memory.workspace());
    const MatView<double> y = memory.zeros(kTokens, kOut);
    const auto prepared = layer.prepare(weights, memory.workspace());
    layer.forward(prepared, input, y, &tape, memory.context());
    return weighted_sum(y, dy);
  };
  loss();
  const auto d_tape = layer.router().make_tape(memory.workspace(), kTokens);
  mole::params::zero(d_tape);
  const MatView<double> dx = memory.zeros(kTokens, kIn);
  layer.backward(weights, tape, input, dy, d_tape, {.x = dx}, grad, memory.context());
  CHECK(params_gradient_error(params, grad, loss) == "");
  CHECK(gradient_error("x", x, dx, loss) == "");
  CHECK(gradient_error("gates", gates, d_tape.prob, loss) == "");
}

}  // namespace skeleton

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/expert_choice.hpp"

#include <vector>

#include "mole/experts/lora_bank.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/mixture.hpp"
#include "skeletons/golden_case.hpp"
#include "skeletons/support.hpp"
#include "support/catch.hpp"

namespace skeleton {

namespace {

using Router = mole::ExpertChoiceRouter<double>;
using Bank = mole::LoraBank<double>;
using Mixture = mole::Mixture<Router, Bank>;
using Adapted = mole::AdaptedLinear<Mixture>;

mole::ExpertChoiceScore score_of(const GoldenCase& c) {
  if (c.text("score") == "softmax_experts") return mole::ExpertChoiceScore::over_experts;
  return c.text("score") == "softmax_tokens" ? mole::ExpertChoiceScore::over_tokens
                                             : mole::ExpertChoiceScore::over_selected;
}

struct DenseRouting {
  MatView<double> gate, mask;
};

DenseRouting dense(Memory& memory, const mole::Routing<double>& routing) {
  const DenseRouting all{memory.zeros(routing.tokens, routing.experts),
                         memory.zeros(routing.tokens, routing.experts)};
  for (Index t = 0; t < routing.tokens; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      all.gate(t, routing.expert[s]) = routing.gate[s];
      all.mask(t, routing.expert[s]) = 1;
    }
  }
  return all;
}

}  // namespace

TEST_CASE("an expert choice router gives the golden gates and gradients", "[routers]") {
  const std::string name = GENERATE(from_range(GoldenCase::names("router.expert_choice__")));
  INFO(name);
  const GoldenCase c(name);
  Memory memory;
  const bool from_x = c.text("input") == "x";
  const MatView<const double> x = c.matrix(from_x ? "in.x" : "in.logits");
  const MatView<const double> dgate = c.matrix("in.dgate");
  const Index experts = dgate.cols;
  // Given logits are the x of a router whose weight is the unit matrix.
  const MatView<double> weight = memory.zeros(experts, x.cols),
                        d_weight = memory.zeros(experts, x.cols);
  for (Index e = 0; !from_x && e < experts; ++e) weight(e, e) = 1;
  if (from_x) add(weight, c.matrix("param.router.weight"));

  const Router router({.width = x.cols,
                       .experts = experts,
                       .capacity_factor = c.number("capacity_factor"),
                       .score = score_of(c)});
  const auto prepared = router.prepare({weight, {}}, memory.workspace());
  Router::Tape tape = router.make_tape(memory.workspace(), x.rows);
  const Router::Tape d_tape = router.make_tape(memory.workspace(), x.rows);
  mole::params::zero(d_tape);
  mole::RoutingTable<double> table(memory.workspace(), x.rows, experts, router.max_per_token());
  CHECK(router.rule().capacity(x.rows, experts) == static_cast<Index>(c.number("capacity")));

  router.forward(prepared, {}, {.x = x}, {}, {}, table, {}, &tape, memory.context());
  const mole::Routing<double> routing = table.view();
  CHECK(c.difference("out.gate", dense(memory, routing).gate) == "");
  CHECK(c.difference("out.mask", dense(memory, routing).mask) == "");
  for (Index t = 0; t < x.rows; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      d_tape.gate(0, s) = dgate(t, routing.expert[s]);
    }
  }
  const MatView<double> dx = memory.zeros(x.rows, x.cols);
  router.backward({weight, {}}, {}, tape, {.x = x}, {}, {}, routing, d_tape, {}, dx, {d_weight, {}},
                  {}, memory.context());
  CHECK(c.difference(from_x ? "grad.in.x" : "grad.in.logits", dx) == "");
  if (from_x) CHECK(c.difference("grad.param.router.weight", d_weight) == "");
}

TEST_CASE("an adapted linear map routed by expert choice gives the golden values", "[routers]") {
  const std::string name = GENERATE(from_range(GoldenCase::names("layer.expert_choice__")));
  INFO(name);
  const GoldenCase c(name);
  Memory memory;
  const MatView<const double> x = c.matrix("in.x");
  const Index experts = c.extent("param.A", 0), rank = c.extent("param.A", 1);
  const Index out = c.extent("param.B", 1);
  const auto count = static_cast<std::size_t>(experts);
  const Bank bank({.in = x.cols,
                   .out = out,
                   .rank = std::vector<Index>(count, rank),
                   .scale = std::vector<double>(count, c.number("alpha") / c.number("r"))});
  const Adapted layer(Mixture(Router({.width = x.cols,
                                      .experts = experts,
                                      .capacity_factor = c.number("capacity_factor"),
                                      .score = score_of(c)}),
                              bank));
  const auto params = bank.make_params<double>(memory.workspace());
  const auto d_params = bank.make_params<double>(memory.workspace());
  mole::params::zero(params);
  mole::params::zero(d_params);
  for (Index e = 0; e < experts; ++e) {
    add(params.down_of(e), c.slice("param.A", e));
    add(params.up_of(e), c.slice("param.B", e));
  }
  const MatView<double> d_router = memory.zeros(experts, x.cols);
  const Adapted::Weights weights{
      c.matrix("param.weight"), {}, {{c.matrix("param.router.weight"), {}}, params}};
  auto tape = layer.make_tape(memory.workspace(), x.rows);
  const auto d_tape = layer.router().make_tape(memory.workspace(), x.rows);
  mole::params::zero(d_tape);
  const MatView<double> y = memory.zeros(x.rows, out), dx = memory.zeros(x.rows, x.cols);
  layer.forward(layer.prepare(weights, memory.workspace()), x, y, &tape, memory.context());
  layer.backward(weights, tape, x, c.matrix("in.dy"), d_tape, {.x = dx},
                 {{}, {}, {{d_router, {}}, d_params}}, memory.context());

  CHECK(c.difference("out.y", y) == "");
  CHECK(c.difference("out.logits", tape.router.logits) == "");
  CHECK(c.difference("grad.in.x", dx) == "");
  CHECK(c.difference("grad.param.router.weight", d_router) == "");
  for (Index e = 0; e < experts; ++e) {
    CHECK(c.slice_difference("grad.param.A", e, d_params.down_of(e)) == "");
    CHECK(c.slice_difference("grad.param.B", e, d_params.up_of(e)) == "");
  }
}

TEST_CASE("gradients flow through scores that run over tokens; padding takes no place",
          "[routers]") {
  constexpr Index kTokens = 11, kWidth = 5, kExperts = 3;
  const mole::ExpertChoiceScore score =
      GENERATE(mole::ExpertChoiceScore::over_experts, mole::ExpertChoiceScore::over_tokens,
               mole::ExpertChoiceScore::over_selected);
  const Mixture layer(
      Router({.width = kWidth, .experts = kExperts, .capacity_factor = 1.2, .score = score}),
      Bank({.in = kWidth, .out = 7, .rank = {2, 1, 3}, .scale = {1, 0.5, 2}}));
  Memory memory(3);
  memory.limit_scratch(layer.scratch_bytes(kTokens, 1));
  const Mixture::Params<double> params{{memory.random(kExperts, kWidth), {}},
                                       layer.experts().make_params<double>(memory.workspace())};
  const Mixture::Params<double> grad{{memory.zeros(kExperts, kWidth), {}},
                                     layer.experts().make_params<double>(memory.workspace())};
  memory.fill_params(params.experts);
  mole::params::zero(grad.experts);
  const Mixture::Weights weights{params.router, params.experts};
  std::vector<std::uint8_t> mask(kTokens, 1);
  mask[4] = 0;
  const MatView<double> x = memory.random(kTokens, kWidth), dy = memory.random(kTokens, 7);
  const MatView<double> c_prob = memory.random(kTokens, kExperts);
  mole::LayerInput<double> input = x;
  input.mask = mask;
  auto tape = layer.make_tape(memory.workspace(), kTokens);
  const auto d_tape = layer.router().make_tape(memory.workspace(), kTokens);

  const auto loss = [&] {
    const mole::Workspace::Frame frame(memory.workspace());
    const MatView<double> y = memory.zeros(kTokens, 7);
    const auto prepared = layer.prepare(weights, memory.workspace());
    layer.forward(prepared, input, y, &tape, memory.context());
    return weighted_sum(y, dy) + weighted_sum(tape.router.prob, c_prob);
  };
  loss();
  const mole::Routing<double> routing = tape.routing.view();
  CHECK(routing.slots() == 4 * kExperts);
  CHECK(routing.token_begin[5] == routing.token_begin[4]);
  mole::params::zero(d_tape);
  add(d_tape.prob, c_prob);
  const MatView<double> dx = memory.zeros(kTokens, kWidth);
  layer.backward(weights, tape, input, dy, d_tape, {.x = dx}, grad, memory.context());
  CHECK(params_gradient_error(params, grad, loss) == "");
  CHECK(gradient_error("x", x, dx, loss) == "");
}

}  // namespace skeleton

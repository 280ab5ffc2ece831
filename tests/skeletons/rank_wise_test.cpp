// SPDX-License-Identifier: Apache-2.0
#include "skeletons/rank_wise.hpp"

#include "skeletons/golden_case.hpp"
#include "skeletons/support.hpp"
#include "support/catch.hpp"

namespace skeleton {

namespace {

using Layer = RankWise<double>;
using Params = Layer::Params<double>;

/// [A_old; A] and [B_old, B]. Old ranks are there from the second task on.
Params pool(Memory& memory, const GoldenCase& c) {
  const MatView<const double> down = c.matrix("param.A"), up = c.matrix("param.B");
  const MatView<const double> old_down = c.matrix("param.A_old"), old_up = c.matrix("param.B_old");
  const Params params{memory.copy(c.matrix("param.weight")), memory.copy(c.matrix("param.bias")),
                      memory.zeros(old_down.rows + down.rows, down.cols),
                      memory.zeros(up.rows, old_up.cols + up.cols)};
  add(params.down.row_block(0, old_down.rows), old_down);
  add(params.down.row_block(old_down.rows, down.rows), down);
  add(params.up.col_block(0, old_up.cols), old_up);
  add(params.up.col_block(old_up.cols, up.cols), up);
  return params;
}

}  // namespace

TEST_CASE("a layer whose router reads X Aᵀ gives the golden values", "[skeletons]") {
  const std::string name = GENERATE(from_range(GoldenCase::names("layer.moram__")));
  INFO(name);
  const GoldenCase c(name);
  Memory memory;
  const MatView<const double> x = c.matrix("in.x");
  const auto old_ranks = static_cast<Index>(c.number("rank_old"));
  const auto new_ranks = static_cast<Index>(c.number("rank_new"));
  const Index ranks = old_ranks + new_ranks, out = c.extent("out.y", 1);
  std::vector<double> scale(static_cast<std::size_t>(ranks), c.number("scale_new"));
  std::fill_n(scale.begin(), old_ranks, 1.0);
  const Layer layer(x.cols, out, scale,
                    {.ranks = ranks,
                     .k = std::max<Index>(static_cast<Index>(c.number("topk")), 2),
                     .temperature = c.number("tau"),
                     .threshold = c.number("training") == 1 ? 0.0 : c.number("delta"),
                     .epsilon = c.number("eps")});
  const Params params = pool(memory, c),
               grad{{}, {}, memory.zeros(ranks, x.cols), memory.zeros(out, ranks)};
  Layer::Tape tape = layer.make_tape(memory.workspace(), x.rows);
  const Layer::RouterTape d_tape = layer.make_router_tape(memory.workspace(), x.rows);
  mole::params::zero(d_tape);
  const MatView<double> y = memory.zeros(x.rows, out), dx = memory.zeros(x.rows, x.cols);

  layer.forward(params, x, y, &tape, memory.workspace(), memory.context());
  layer.backward(params, tape, x, c.matrix("in.dy"), d_tape, dx, grad, memory.workspace(),
                 memory.context());
  const mole::Routing<double> routing = tape.routing.view();
  const MatView<double> gate = memory.zeros(x.rows, ranks);
  for (Index t = 0; t < x.rows; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      gate(t, routing.expert[s]) = routing.gate[s];
    }
  }
  CHECK(c.difference("out.key", tape.router.logits) == "");
  CHECK(c.difference("out.gate", gate) == "");
  CHECK(c.difference("out.y", y) == "");
  CHECK(c.difference("grad.in.x", dx) == "");
  CHECK(c.difference("grad.param.A", grad.down.row_block(old_ranks, new_ranks)) == "");
  CHECK(c.difference("grad.param.B", grad.up.col_block(old_ranks, new_ranks)) == "");
}

TEST_CASE("A has a gradient as the down matrix and as what the router reads", "[skeletons]") {
  constexpr Index kTokens = 5, kIn = 7, kOut = 4, kRanks = 6;
  const Layer layer(kIn, kOut, {1, 2, 0.5, 1, 1, -1},
                    {.ranks = kRanks, .k = 3, .temperature = 0.4, .threshold = 0.3});
  Memory memory(11);
  const Params params{memory.random(kOut, kIn), memory.random(1, kOut), memory.random(kRanks, kIn),
                      memory.random(kOut, kRanks)};
  const Params grad{memory.zeros(kOut, kIn), memory.zeros(1, kOut), memory.zeros(kRanks, kIn),
                    memory.zeros(kOut, kRanks)};
  const MatView<double> x = memory.random(kTokens, kIn), dy = memory.random(kTokens, kOut);
  const MatView<double> c_prob = memory.random(kTokens, kRanks);
  Layer::Tape tape = layer.make_tape(memory.workspace(), kTokens);
  const auto loss = [&] {
    const mole::Workspace::Frame frame(memory.workspace());
    const MatView<double> y = memory.zeros(kTokens, kOut);
    layer.forward(params, x, y, &tape, memory.workspace(), memory.context());
    return weighted_sum(y, dy) + weighted_sum(tape.router.prob, c_prob);
  };
  loss();
  CHECK(tape.routing.view().slots() < 3 * kTokens);  // the threshold drops some
  const Layer::RouterTape d_tape = layer.make_router_tape(memory.workspace(), kTokens);
  mole::params::zero(d_tape);
  add(d_tape.prob, c_prob);
  const MatView<double> dx = memory.zeros(kTokens, kIn);
  layer.backward(params, tape, x, dy, d_tape, dx, grad, memory.workspace(), memory.context());
  CHECK(params_gradient_error(params, grad, loss) == "");
  CHECK(gradient_error("x", x, dx, loss) == "");
}

}  // namespace skeleton

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/gru.hpp"

#include <array>
#include <vector>

#include "mole/experts/lora_bank.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/mixture.hpp"
#include "skeletons/golden_case.hpp"
#include "skeletons/support.hpp"
#include "support/catch.hpp"

namespace skeleton {

namespace {

using Router = mole::GruRouter<double>;
using Bank = mole::LoraBank<double>;
using Mixture = mole::Mixture<Router, Bank>;
using Adapted = mole::AdaptedLinear<Mixture>;

/// The cell of a stack, in one block.
mole::CellParams<double> make_cell(Memory& memory, Index state) {
  return {memory.random(3 * state, state), memory.random(3 * state, state),
          memory.random(1, 3 * state), memory.random(1, 3 * state)};
}

Router::Params<double> make_router_params(Memory& memory, const Router::Config& c,
                                          const mole::CellParams<double>& cell) {
  return {memory.random(c.state, c.width), {memory.random(c.experts, c.state), {}}, cell};
}

/// x_{l+1} = x_l + layer_l(x_l), the hidden state handed on from layer to layer.
template <class Layer>
struct Stack {
  using LayerParams = typename Layer::template Params<double>;
  using Weights = typename Layer::Weights;

  const Layer& layer;
  Memory& memory;
  std::vector<Weights> weights;
  std::vector<typename Layer::Tape> tapes;
  std::vector<typename Layer::RouterTape> d_tapes;
  std::vector<MatView<double>> x, state;  // [layers + 1], what goes into each layer and out of it

  Stack(const Layer& of, Memory& in, std::vector<Weights> all, Index tokens, Index state_width)
      : layer(of), memory(in), weights(std::move(all)) {
    for (std::size_t l = 0; l <= weights.size(); ++l) {
      x.push_back(memory.zeros(tokens, layer.input_width()));
      state.push_back(memory.zeros(tokens, state_width));
    }
    for (std::size_t l = 0; l < weights.size(); ++l) {
      tapes.push_back(layer.make_tape(memory.workspace(), tokens));
      d_tapes.push_back(layer.router().make_tape(memory.workspace(), tokens));
      mole::params::zero(d_tapes.back());
    }
  }

  /// From x[0] and state[0]; `with_tape` false is inference.
  void forward(bool with_tape = true) {
    for (std::size_t l = 0; l < weights.size(); ++l) {
      const mole::Workspace::Frame frame(memory.workspace());
      const auto prepared = layer.prepare(weights[l], memory.workspace());
      mole::params::zero(Wrapped{x[l + 1]});
      layer.forward(prepared, {}, x[l], {state[l]}, x[l + 1], {state[l + 1]},
                    with_tape ? &tapes[l] : nullptr, memory.context());
      add(x[l + 1], x[l]);
    }
  }

  /// dx, d_state: gradients by the last layer's output on entry, by x[0] and state[0] on return.
  void backward(const std::vector<LayerParams>& grad, MatView<double> dx, MatView<double> d_state) {
    for (std::size_t l = weights.size(); l-- > 0;) {
      const mole::Workspace::Frame frame(memory.workspace());
      const MatView<double> d_input = memory.copy(dx);
      const MatView<double> d_carry = memory.zeros(d_state.rows, d_state.cols);
      layer.backward(weights[l], {}, tapes[l], x[l], {state[l]}, dx, d_tapes[l], {d_state},
                     {.x = d_input}, grad[l], {d_carry}, memory.context());
      for (Index t = 0; t < dx.rows; ++t) {
        std::ranges::copy(d_input.row(t), dx.row(t).begin());
        std::ranges::copy(d_carry.row(t), d_state.row(t).begin());
      }
    }
  }

  struct Wrapped {
    MatView<double> view;
    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(mole::Leaf{"view"}, p.view...);
    }
  };
};

}  // namespace

TEST_CASE("gradients flow through depth and into the cell that three layers share", "[routers]") {
  constexpr Index kTokens = 5, kWidth = 7;
  const Router::Config config{.width = kWidth, .experts = 4, .state = 3, .k = 2};
  const Mixture layer(
      Router(config),
      Bank({.in = kWidth, .out = kWidth, .rank = {2, 1, 0, 3}, .scale = {0.5, 1, 1, 2}}));
  Memory memory(7);
  memory.limit_scratch(layer.scratch_bytes(kTokens, 1));
  const mole::CellParams<double> cell = make_cell(memory, config.state);
  const mole::CellParams<double> d_cell = make_cell(memory, config.state);
  mole::params::zero(d_cell);
  std::vector<Mixture::Params<double>> params, grad;
  std::vector<Mixture::Weights> weights;
  for (int l = 0; l < 3; ++l) {
    params.push_back({make_router_params(memory, config, cell),
                      layer.experts().make_params<double>(memory.workspace())});
    memory.fill_params(params[l].experts, 0.5);
    weights.push_back({params[l].router, params[l].experts});
    grad.push_back({make_router_params(memory, config, d_cell),
                    layer.experts().make_params<double>(memory.workspace())});
    mole::params::zero(grad[l]);
  }
  Stack<Mixture> stack(layer, memory, weights, kTokens, config.state);
  memory.fill(stack.x[0]);
  memory.fill(stack.state[0]);

  // Σ y ∘ c_y + Σ h_3 ∘ c_h + Σ_l Σ prob_l ∘ c_l: the last two are what a loss and a fourth layer
  // add.
  const MatView<double> c_y = memory.random(kTokens, kWidth);
  const MatView<double> c_h = memory.random(kTokens, config.state);
  const MatView<double> c_prob = memory.random(kTokens, config.experts);
  const auto loss = [&] {
    stack.forward();
    double sum = weighted_sum(stack.x[3], c_y) + weighted_sum(stack.state[3], c_h);
    for (const auto& tape : stack.tapes) sum += weighted_sum(tape.router.prob, c_prob);
    return sum;
  };
  loss();
  for (const auto& d_tape : stack.d_tapes) add(d_tape.prob, c_prob);
  const MatView<double> dx = memory.copy(c_y), d_state = memory.copy(c_h);
  stack.backward(grad, dx, d_state);

  CHECK(params_gradient_error(cell, d_cell, loss) == "");
  for (int l = 0; l < 3; ++l) {
    INFO("layer " << l);
    CHECK(params_gradient_error(params[l], grad[l], loss) == "");
  }
  CHECK(gradient_error("x", stack.x[0], dx, loss) == "");
  CHECK(gradient_error("h_0", stack.state[0], d_state, loss) == "");
  CHECK(mole::params::count(params[0]) ==
        config.state * kWidth + config.experts * config.state + 6 * 2 * kWidth);

  stack.forward();
  const MatView<double> y = memory.copy(stack.x[3]);
  stack.forward(false);
  bool same = true;
  for (Index t = 0; t < kTokens; ++t)
    same = same && std::ranges::equal(y.row(t), stack.x[3].row(t));
  CHECK(same);
}

TEST_CASE("a gradient of the cell may lack members, and none may have another shape", "[routers]") {
  using Cell = mole::CellParams<double>;
  constexpr Index kTokens = 5, kWidth = 7, kState = 3, kExperts = 4;
  const Router router({.width = kWidth, .experts = kExperts, .state = kState, .k = 2});
  Memory memory(3);
  const auto params = make_router_params(memory, router.config(), make_cell(memory, kState));
  const MatView<double> x = memory.random(kTokens, kWidth), h = memory.random(kTokens, kState);
  const MatView<double> d_logits = memory.random(kTokens, kExperts);
  mole::RoutingTable<double> table(memory.workspace(), kTokens, kExperts, 2);
  auto tape = router.make_tape(memory.workspace(), kTokens);
  const auto d_tape = router.make_tape(memory.workspace(), kTokens);
  router.forward(router.prepare(params, memory.workspace()), {}, {.x = x}, {}, {h}, table, {},
                 &tape, memory.context());
  const auto backward = [&](const Cell& grad) {
    mole::params::zero(d_tape);
    add(d_tape.logits, d_logits);
    Router::Params<double> to{};
    to.cell = grad;
    router.backward(params, {}, tape, {.x = x}, {}, {h}, table.view(), d_tape, {}, {}, to, {},
                    memory.context());
  };
  const Cell all = make_cell(memory, kState);
  mole::params::zero(all);
  backward(all);
  for (const auto member :
       {&Cell::input_weight, &Cell::hidden_weight, &Cell::input_bias, &Cell::hidden_bias}) {
    const MatView<double> expected = all.*member;
    Cell one{};
    one.*member = memory.zeros(expected.rows, expected.cols);
    backward(one);
    CHECK(test::bit_difference(one.*member, expected) == "");
    CHECK(weighted_sum(expected, expected) > 0);
    const MatView<double> wide = memory.zeros(expected.rows, expected.cols + 1);
    one.*member = wide;
    CHECK_THROWS_AS(backward(one), mole::Error);
    CHECK(weighted_sum(wide, wide) == 0);
  }
  const mole::RecurrentCell<double> plain{kState, kState, mole::CellKind::gru, false};
  CHECK_NOTHROW(plain.check_gradient({{}, all.hidden_weight}));
  CHECK_THROWS_WITH(plain.check_gradient({{}, {}, {}, all.hidden_bias}),
                    "grad.cell.hidden_bias: expected [0, 0], got [1, 9]");
}

namespace {

constexpr std::array<const char*, 3> kGates = {"r", "z", "n"};

/// One block of three out of the tensors of a case, for example param.weight_{ir,iz,in}.
MatView<double> gather(Memory& memory, const GoldenCase& c, const std::string& name) {
  const MatView<const double> first = c.matrix(name + "r");
  const Index rows = name.find("bias") == std::string::npos ? first.rows : 1;
  const bool stacked = rows > 1 || first.cols == 1;
  const MatView<double> all =
      stacked ? memory.zeros(3 * rows, first.cols) : memory.zeros(1, 3 * first.cols);
  for (std::size_t g = 0; g < 3; ++g) {
    const auto block = static_cast<Index>(g);
    const MatView<const double> part = c.matrix(name + kGates[g]);
    add(stacked ? all.row_block(block * rows, rows) : all.col_block(block * part.cols, part.cols),
        part);
  }
  return all;
}

mole::CellParams<double> gather_cell(Memory& memory, const GoldenCase& c) {
  return {gather(memory, c, "param.weight_i"), gather(memory, c, "param.weight_h"),
          gather(memory, c, "param.bias_i"), gather(memory, c, "param.bias_h")};
}

void check_cell_gradient(const GoldenCase& c, const mole::CellParams<double>& grad) {
  const Index p = grad.input_weight.cols;
  for (Index g = 0; g < 3; ++g) {
    const std::string gate = kGates[static_cast<std::size_t>(g)];
    CHECK(c.difference("grad.param.weight_i" + gate, grad.input_weight.row_block(g * p, p)) == "");
    CHECK(c.difference("grad.param.weight_h" + gate, grad.hidden_weight.row_block(g * p, p)) == "");
    CHECK(c.difference("grad.param.bias_i" + gate, grad.input_bias.col_block(g * p, p)) == "");
    CHECK(c.difference("grad.param.bias_h" + gate, grad.hidden_bias.col_block(g * p, p)) == "");
  }
}

}  // namespace

TEST_CASE("a stack of recurrent routers gives the golden outputs and gradients", "[routers]") {
  const std::string name = GENERATE(from_range(GoldenCase::names("layer.rmoe_chain__")));
  INFO(name);
  const GoldenCase c(name);
  Memory memory;
  const auto layers = static_cast<std::size_t>(c.number("layers"));
  const Index experts = c.extent("param.A", 1), rank = c.extent("param.A", 2);
  const Router::Config config{.width = c.extent("in.x", 1),
                              .experts = experts,
                              .state = c.extent("in.dh", 1),
                              .k = static_cast<Index>(c.number("top_k"))};
  const auto count = static_cast<std::size_t>(experts);
  Bank bank({.in = config.width,
             .out = config.width,
             .rank = std::vector<Index>(count, rank),
             .scale = std::vector<double>(count, c.number("scaling"))});
  const Adapted layer(Mixture(Router(config), bank));
  const mole::CellParams<double> cell = gather_cell(memory, c),
                                 d_cell = make_cell(memory, config.state);
  mole::params::zero(d_cell);

  std::vector<Adapted::Params<double>> params, grad;
  std::vector<Adapted::Weights> weights;
  const auto make = [&](const mole::CellParams<double>& of) {
    return Adapted::Params<double>{
        memory.zeros(config.width, config.width),
        {},
        {make_router_params(memory, config, of), bank.make_params<double>(memory.workspace())}};
  };
  for (std::size_t l = 0; l < layers; ++l) {
    const auto i = static_cast<Index>(l);
    params.push_back(make(cell));
    grad.push_back(make(d_cell));
    mole::params::zero(params[l]);
    mole::params::zero(grad[l]);
    add(params[l].weight, c.slice("param.base", i));
    add(params[l].mixture.router.projection, c.slice("param.weight1", i));
    add(params[l].mixture.router.head.weight, c.slice("param.weight2", i));
    for (Index e = 0; e < experts; ++e) {
      add(params[l].mixture.experts.down_of(e), c.slice("param.A", i).row_block(e * rank, rank));
      add(params[l].mixture.experts.up_of(e),
          c.slice("param.B", i).row_block(e * config.width, config.width));
    }
    weights.push_back(
        {params[l].weight, {}, {params[l].mixture.router, params[l].mixture.experts}});
  }
  Stack<Adapted> stack(layer, memory, weights, c.extent("in.x", 0), config.state);
  add(stack.x[0], c.matrix("in.x"));
  if (c.has("state.h")) add(stack.state[0], c.matrix("state.h"));
  stack.forward();
  const MatView<double> dx = memory.copy(c.matrix("in.dy")), dh = memory.copy(c.matrix("in.dh"));
  stack.backward(grad, dx, dh);

  CHECK(c.difference("out.y", stack.x[layers]) == "");
  CHECK(c.difference("out.state.h", stack.state[layers]) == "");
  CHECK(c.difference("grad.in.x", dx) == "");
  if (c.has("grad.state.h")) CHECK(c.difference("grad.state.h", dh) == "");
  check_cell_gradient(c, d_cell);
  for (std::size_t l = 0; l < layers; ++l) {
    const auto i = static_cast<Index>(l);
    const auto& d = grad[l].mixture;
    CHECK(c.slice_difference("out.logits", i, stack.tapes[l].router.logits) == "");
    CHECK(c.slice_difference("grad.param.base", i, grad[l].weight) == "");
    CHECK(c.slice_difference("grad.param.weight1", i, d.router.projection) == "");
    CHECK(c.slice_difference("grad.param.weight2", i, d.router.head.weight) == "");
    const MatView<double> d_down = memory.zeros(experts * rank, config.width);
    const MatView<double> d_up = memory.zeros(experts * config.width, rank);
    for (Index e = 0; e < experts; ++e) {
      add(d_down.row_block(e * rank, rank), d.experts.down_of(e));
      add(d_up.row_block(e * config.width, config.width), d.experts.up_of(e));
    }
    CHECK(c.slice_difference("grad.param.A", i, d_down) == "");
    CHECK(c.slice_difference("grad.param.B", i, d_up) == "");
  }
}

}  // namespace skeleton

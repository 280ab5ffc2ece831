// SPDX-License-Identifier: Apache-2.0
// A router that remembers. Tokens of four texts go down the 31 depths of a language model; at every
// depth a router must say which text a token is from. One GRU router carries a state from depth to
// depth; independent routers, one a depth, start afresh. Writes the picture
// 05_recurrent_router.svg.
//
//   loss = mean over depths and tokens of -ln softmax(logits)[text], minimised with AdamW
#include <fstream>

#include "mole/core/random.hpp"
#include "mole/layers/recurrent_stack.hpp"
#include "mole/losses/supervised.hpp"
#include "mole/optim/adamw.hpp"
#include "mole/routers/top_k.hpp"
#include "support/depth_recording.hpp"

using namespace mole;
using R = DepthRecording;

constexpr int kSteps = 60;
constexpr AdamWOptions kAdamW = {.learning_rate = 3e-3, .weight_decay = 0.1};

// Weights drawn at random, their gradient and the two moments of AdamW.
template <class Params>
struct Training {
  Params weights, grad, first, second;

  template <class Make>
  explicit Training(Make make) {
    for (Params* params : {&weights, &grad, &first, &second}) params::zero(*params = make());
    std::uint64_t stream = 0;
    const auto draw = [&](const Leaf&, const MatView<float>& m) {
      const Random random(2026, ++stream);
      for (Index i = 0; i < m.size(); ++i) m.data[i] = 0.02f * random.normal(i);
    };
    Params::visit(draw, weights);
  }
  void step(int number) const { adamw_step(weights, grad, first, second, kAdamW, number); }
};

Choices recurrent(const R& recorded, const Context& context, Workspace& memory) {
  const RecurrentStack<float> stack(
      {.layers = R::kDepths, .width = R::kWidth, .experts = 4, .state = 32, .k = 1});
  const Training<RecurrentStackParams<float>> own([&] { return stack.make_params(memory); });
  auto pass = stack.make_pass(memory, R::kTokens, true);
  auto d = stack.make_gradient(memory, R::kTokens);
  const auto forward = [&](Index tokens) {
    const Workspace::Frame frame(memory);
    const auto prepared = stack.prepare(own.weights, memory);
    stack.begin(pass, tokens);
    for (Index l = 0; l < R::kDepths; ++l) {
      stack.route(l, prepared, {.x = recorded.at(l, tokens)}, {}, pass, context);
    }
  };
  for (int step = 1; step <= kSteps; ++step) {
    forward(R::kLearning);
    stack.begin_backward(pass, {}, d);
    params::zero(own.grad);
    for (Index l = R::kDepths; l-- > 0;) {
      domain_loss<float>(1.0f / R::kDepths, pass.tapes[l].logits.row_block(0, R::kLearning),
                         recorded.labels(R::kLearning),
                         d.tapes[l].logits.row_block(0, R::kLearning), context);
      stack.route_backward(l, own.weights, pass, {.x = recorded.at(l, R::kLearning)}, {}, d, {},
                           own.grad, context);
    }
    own.step(step);
  }
  forward(R::kTokens);
  Choices choices{"recurrent"};
  for (Index l = 0; l < R::kDepths; ++l) {
    std::ranges::copy(pass.tables[l].view().expert, &choices.at(l, 0));
  }
  return choices;
}

Choices independent(const R& recorded, const Context& context, Workspace& memory) {
  const TopKRouter<float> router({.width = R::kWidth, .experts = 4, .k = 1});
  auto table = RoutingTable<float>(memory, R::kTokens, 4, 1);
  const auto tape = router.make_tape(memory, R::kTokens), d = router.make_tape(memory, R::kTokens);
  Choices choices{"independent"};
  for (Index l = 0; l < R::kDepths; ++l) {
    const Workspace::Frame frame(memory);
    const Training<LinearParams<float>> own([&] { return router.make_params(memory); });
    const auto forward = [&](Index tokens) {
      const Workspace::Frame packed(memory);
      auto copy = tape;
      router.forward(router.prepare(own.weights, memory), {}, {.x = recorded.at(l, tokens)}, {}, {},
                     table, {}, &copy, context);
    };
    for (int step = 1; step <= kSteps; ++step) {
      forward(R::kLearning);
      params::zero(d);
      params::zero(own.grad);
      domain_loss<float>(1.0f, tape.logits.row_block(0, R::kLearning),
                         recorded.labels(R::kLearning), d.logits.row_block(0, R::kLearning),
                         context);
      router.backward(own.weights, {}, tape, {.x = recorded.at(l, R::kLearning)}, {}, {},
                      table.view(), d, {}, {}, own.grad, {}, context);
      own.step(step);
    }
    forward(R::kTokens);
    std::ranges::copy(table.view().expert, &choices.at(l, 0));
  }
  return choices;
}

int main() {
  const R recorded(MOLE_EXAMPLE_DATA "/hidden.safetensors");
  Buffer memory(64 << 20), scratch(16 << 20);
  Workspace workspace(memory.span()), scratch_space(scratch.span());
  const Context context{.scratch = scratch_space};
  const Choices with = recurrent(recorded, context, workspace);
  const Choices without = independent(recorded, context, workspace);
  print_by_depth(recorded, with, without);
  std::ofstream("05_recurrent_router.svg") << depth_svg(recorded, {with, without});
  fmt::print("Picture: 05_recurrent_router.svg\n");
  return with.stay() > without.stay() ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
// Routers that go by likeness to prototypes, and the loss that moves the prototypes.
#include "mole/routers/prototype.hpp"
#include "contracts/router_table.hpp"
#include "mole/losses/routing_contrastive.hpp"
#include "mole/routers/prototype_choice.hpp"
#include "mole/routers/top_any.hpp"
#include "support/slots.hpp"

namespace {

using mole::Index;
using mole::PrototypeWeight;

template <class Keep>
void each_router(Keep keep) {
  keep(ROUTER_ROW(PrototypeRouter, .width = 13, .experts = 7, .k = 2));
  keep(ROUTER_ROW(PrototypeRouter, .width = 13, .experts = 67, .k = 5,
                  .weight = PrototypeWeight::sigmoid, .scale = T(3)));
  keep(ROUTER_ROW(PrototypeRouter, .width = 13, .experts = 7, .k = 7,
                  .weight = PrototypeWeight::softmax));
  keep(ROUTER_ROW(PrototypeRouter, .width = 13, .experts = 7, .k = 3,
                  .weight = PrototypeWeight::softmax_of_selected, .scale = T(2)));
  keep(ROUTER_ROW(PrototypeRouter, .width = 13, .experts = 7, .k = 2,
                  .weight = PrototypeWeight::unit));
  keep(ROUTER_ROW(PrototypeRouter, .width = 13, .experts = 7, .k = 3,
                  .weight = PrototypeWeight::softmax, .learned_scale = true, .projection = 4));
  keep(ROUTER_ROW(TopAnyRouter, .width = 13, .experts = 7));
  keep(ROUTER_ROW(TopAnyRouter, .width = 13, .experts = 67, .average = false, .scale = T(2)));
  keep(ROUTER_ROW(PrototypeChoiceRouter, .width = 13, .experts = 7, .k = 2));
  keep(ROUTER_ROW(PrototypeChoiceRouter, .width = 13, .experts = 7,
                  .weight = PrototypeWeight::sigmoid));
  keep(ROUTER_ROW(PrototypeChoiceRouter, .width = 13, .experts = 7, .k = 3,
                  .weight = PrototypeWeight::softmax, .scale = T(2)));
}

/// Token 7 has the last expert.
template <template <class> class R, class T>
void check_unconditional() {
  for (const auto weight :
       {PrototypeWeight::cosine, PrototypeWeight::sigmoid, PrototypeWeight::softmax}) {
    const R<T> router({.width = 13,
                       .experts = 5,
                       .k = 2,
                       .weight = weight,
                       .unconditional = true,
                       .unconditional_id = 7});
    test::router_contract(router, {.by_score = false});
    const test::RouterCase<R<T>> use(router, {});
    const auto decision = test::decide(use, use.problem(11));
    for (Index t = 0; t < 11; ++t) {
      const auto& experts = decision.experts[t];
      const bool has_last = std::find(experts.begin(), experts.end(), 4) != experts.end();
      CHECK(has_last == (t == 7));
    }
    CHECK(decision.experts[7].size() == 1);
    CHECK(decision.gates[7][0] == 1);
  }
}

}  // namespace

TEST_CASE("Prototype routers keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
  check_unconditional<mole::PrototypeRouter, float>();
  check_unconditional<mole::PrototypeRouter, double>();
  check_unconditional<mole::PrototypeChoiceRouter, float>();
  check_unconditional<mole::PrototypeChoiceRouter, double>();
}

TEST_CASE("Prototype routers give the same bits on threads", "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

TEST_CASE("A prototype router looks at directions, not at lengths", "[routers]") {
  using Router = mole::PrototypeRouter<double>;
  test::RouterCase<Router> use(Router({.width = 4, .experts = 3, .k = 3}), {});
  auto problem = use.problem(2);
  for (Index i = 0; i < 4; ++i) problem.x(1, i) = 8 * problem.x(0, i);
  const auto decision = test::decide(use, problem);
  for (Index e = 0; e < 3; ++e) {
    CHECK(decision.logits(0, e) == Catch::Approx(decision.logits(1, e)));
    CHECK(std::abs(decision.logits(0, e)) <= 1);
    double dot = 0, p = 0, x = 0;
    for (Index i = 0; i < 4; ++i) {
      const double v = use.params.prototypes(e, i), u = problem.x(0, i);
      dot += v * u;
      p += v * v;
      x += u * u;
    }
    CHECK(decision.logits(0, e) == Catch::Approx(dot / std::sqrt(p * x)));
  }
  for (Index i = 0; i < 4; ++i) problem.x(0, i) = 0;
  CHECK(test::decide(use, problem).logits(0, 0) == 0);
}

TEST_CASE("A top-any router takes every expert above its threshold, or else the best",
          "[routers]") {
  using Router = mole::TopAnyRouter<double>;
  test::RouterCase<Router> use(Router({.width = 4, .experts = 3}), {});
  for (Index e = 0; e < 3; ++e) use.params.threshold(0, e) = e == 2 ? 2 : -0.25;
  use.prepare();
  const auto problem = use.problem(20);
  test::RouterCall<Router> call(use, problem);
  call.forward();
  const auto decision = call.decision();
  std::size_t most = 0;
  bool fell_back = false;
  for (Index t = 0; t < 20; ++t) {
    std::vector<std::int32_t> above;
    for (Index e = 0; e < 3; ++e) {
      if (decision.logits(t, e) > use.params.threshold(0, e)) {
        above.push_back(static_cast<std::int32_t>(e));
      }
      CHECK(decision.prob(t, e) == Catch::Approx(1 / (1 + std::exp(-decision.logits(t, e)))));
    }
    most = std::max(most, above.size());
    if (above.empty()) {
      fell_back = true;
      REQUIRE(decision.experts[t].size() == 1);
      const Index best = decision.experts[t][0];
      for (Index e = 0; e < 3; ++e) CHECK(decision.logits(t, e) <= decision.logits(t, best));
    } else {
      CHECK(decision.experts[t] == above);
    }
    for (const double gate : decision.gates[t]) {
      CHECK(gate == 1.0 / static_cast<double>(decision.gates[t].size()));
    }
  }
  CHECK(most == 2);
  CHECK(fell_back);
}

TEST_CASE("A top-any router passes the gradient of its gates straight to both sides", "[routers]") {
  using Router = mole::TopAnyRouter<double>;
  test::RouterCase<Router> use(Router({.width = 4, .experts = 3}), {});
  for (Index e = 0; e < 3; ++e) use.params.threshold(0, e) = -0.5;
  use.prepare();
  const auto problem = use.problem(6);
  test::RouterCall<Router> call(use, problem);
  call.forward();
  const auto gates = call.decision();
  test::Matrix<double> want(1, 3);
  call.set_upstream();
  for (Index t = 0; t < 6; ++t) {
    for (const std::int32_t e : gates.experts[t]) {
      const double upstream = test::RouterCall<Router>::upstream(problem.ids[t], e, 3);
      const double share = upstream / static_cast<double>(gates.experts[t].size());
      const double s = 1 / (1 + std::exp(0.5));
      want(0, e) -= share * s * (1 - s);
    }
  }
  call.backward();
  const auto gradient = call.gradient();
  for (Index e = 0; e < 3; ++e) {
    CHECK(gradient.params[gradient.params.size() - 3 + static_cast<std::size_t>(e)] ==
          Catch::Approx(want(0, e)));
  }
}

TEST_CASE("Experts choose the same number of tokens from every sequence", "[routers]") {
  using Rule = mole::PrototypeChoiceRule<double>;
  CHECK(Rule{.k = 11}.places(15, 11) == 14);  // 15 / 11 · 11 is below 15 in double
  CHECK(Rule{.k = 1}.places(4, 8) == 1);
  CHECK(Rule{.k = 9}.places(4, 3) == 4);
  using Router = mole::PrototypeChoiceRouter<double>;
  const test::RouterCase<Router> use(Router({.width = 13, .experts = 2, .k = 1}), {});
  const auto problem = use.problem(10);
  const std::vector<std::int32_t> begin = {0, 6, 10};
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  auto tokens = problem.tokens();
  tokens.sequence_begin = begin;
  tokens.mask = mask;
  test::Dirty memory(std::size_t{1} << 20), scratch(std::size_t{1} << 20);
  mole::RoutingTable<double> table(memory.workspace(), 10, 2, 2);
  use.router.forward(use.prepared, {}, tokens, {}, {}, table, {}, nullptr,
                     mole::Context{scratch.workspace()});
  int taken[2][2] = {};
  const auto routing = table.view();
  for (Index t = 0; t < 10; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      ++taken[t < 6 ? 0 : 1][routing.expert[s]];
      CHECK(t != 1);
    }
  }
  for (const int e : {0, 1}) {
    CHECK(taken[0][e] == 2);  // five real tokens
    CHECK(taken[1][e] == 2);
  }
}

TEST_CASE("Prototype routers refuse wrong configs by name", "[routers]") {
  using Catch::Matchers::Message;
  CHECK_THROWS_MATCHES(
      mole::PrototypeRouter<float>({.width = 3, .experts = 1, .unconditional = true}), mole::Error,
      Message("PrototypeRouter: experts: expected at least 2, one of them unconditional, got 1"));
  CHECK_THROWS_MATCHES(
      mole::PrototypeRouter<float>({.width = 3, .experts = 4, .k = 4, .unconditional = true}),
      mole::Error, Message("PrototypeRouter: k: expected 1 ... experts with a prototype, got 4"));
  CHECK_THROWS_MATCHES(
      mole::PrototypeChoiceRouter<float>(
          {.width = 3, .experts = 4, .weight = PrototypeWeight::unit}),
      mole::Error,
      Message("PrototypeChoiceRouter: weight: expected cosine, sigmoid or softmax, got unit"));
  CHECK_THROWS_MATCHES(mole::PrototypeRouter<float>({.experts = 4}), mole::Error,
                       Message("PrototypeRouter: width: expected at least 1, got 0"));
}

namespace {

/// A problem for the contrastive loss.
struct ContrastExample {
  test::Matrix<double> x = test::random_matrix(9, 4, 5), p = test::random_matrix(4, 4, 6);
  std::vector<std::int32_t> begin = {0, 5, 9};
  test::Slots slots = test::random_slots(9, 5, 0.6, 3);

  double loss(mole::RoutingContrast how, mole::MatView<double> dx = {},
              mole::MatView<double> dp = {}) const {
    const test::OwnedRouting<double> routing(slots, 5);
    mole::Buffer memory(std::size_t{1} << 16);
    mole::Workspace scratch(memory.span());
    return mole::routing_contrastive_loss<double>(how, x.view(), *routing, p.view(), dx, dp,
                                                  mole::Context{scratch});
  }
};

}  // namespace

TEST_CASE("The gradients of the contrastive loss are its derivatives", "[losses]") {
  ContrastExample example;
  for (const bool by_sequence : {false, true}) {
    for (const bool first : {false, true}) {
      mole::RoutingContrast how{.weight = 0.75, .temperature = 0.5, .first_only = first};
      if (by_sequence) how.sequence_begin = example.begin;
      test::Matrix<double> dx(9, 4), dp(4, 4);
      CHECK(example.loss(how, dx, dp) > 0);
      const auto value = [&] { return example.loss(how); };
      CHECK(test::gradient_error(example.x, dx.view(), value) == "");
      CHECK(test::gradient_error(example.p, dp.view(), value) == "");
    }
  }
}

TEST_CASE("The contrastive loss needs two experts, and ignores those without a prototype",
          "[losses]") {
  ContrastExample example;
  for (auto& slots : example.slots) slots = {{1, 0.5}};
  CHECK(example.loss({}) == 0);
  for (auto& slots : example.slots) slots = {{1, 0.5}, {4, 0.5}};
  CHECK(example.loss({}) == 0);
  example.slots[0] = {{2, 1.0}};
  CHECK(example.loss({}) > 0);
  example.p = test::random_matrix(6, 4, 1);
  CHECK_THROWS_AS(example.loss({}), mole::Error);
  example.p = test::random_matrix(4, 3, 1);
  CHECK_THROWS_AS(example.loss({}), mole::Error);
  example.p = test::random_matrix(4, 4, 1);
  CHECK_THROWS_AS(example.loss({.temperature = 0}), mole::Error);
}

// SPDX-License-Identifier: Apache-2.0
// Routers whose logits come from a small network, a low-rank map or a learned task embedding.
#include "contracts/router_table.hpp"
#include "mole/routers/low_rank.hpp"
#include "mole/routers/mlp.hpp"
#include "mole/routers/task.hpp"

namespace {

using mole::Index;

template <class Keep>
void each_router(Keep keep) {
  using mole::HeadActivation;
  keep(ROUTER_ROW(MlpRouter, .width = 13, .experts = 7, .hidden = 9, .hidden2 = 5, .k = 3,
                  .renormalise = false, .temperature = T(0.8)));
  keep(ROUTER_ROW(MlpRouter, .width = 13, .experts = 67, .hidden = 70,
                  .activation = HeadActivation::tanh, .bias = false));
  keep(ROUTER_ROW(LowRankRouter, .width = 13, .experts = 7, .rank = 3));
  keep(ROUTER_ROW(LowRankRouter, .width = 13, .experts = 67, .rank = 4, .k = 5,
                  .renormalise = false, .temperature = T(2)));
  keep(ROUTER_ROW(TaskRouter, .width = 13, .experts = 7, .tasks = 120, .task_width = 5));
  keep(ROUTER_ROW(TaskRouter, .width = 13, .experts = 67, .tasks = 50, .task_width = 8, .k = 4,
                  .renormalise = true, .bias = true));
}

/// The gates of one call, densely.
template <class R>
test::Matrix<double> gates_of(const test::RouterCase<R>& use,
                              const test::RouterProblem<double>& problem) {
  const auto decision = test::decide(use, problem);
  test::Matrix<double> gate(problem.count(), use.router.experts());
  for (Index t = 0; t < problem.count(); ++t) {
    for (std::size_t i = 0; i < decision.experts[t].size(); ++i) {
      gate(t, decision.experts[t][i]) = decision.gates[t][i];
    }
  }
  return gate;
}

}  // namespace

TEST_CASE("Routers with learned heads keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
}

TEST_CASE("Routers with learned heads give the same bits on threads", "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

TEST_CASE("A low-rank router decides as the linear router with the product of its factors",
          "[routers]") {
  constexpr Index kWidth = 6, kExperts = 5, kRank = 2;
  const test::RouterCase<mole::LowRankRouter<double>> low(
      mole::LowRankRouter<double>(
          {.width = kWidth, .experts = kExperts, .rank = kRank, .temperature = 0.5}),
      {});
  const auto& params = low.params;
  const auto problem = low.problem(4);
  const auto decision = test::decide(low, problem);
  for (Index t = 0; t < 4; ++t) {
    for (Index e = 0; e < kExperts; ++e) {
      double logit = 0;
      for (Index r = 0; r < kRank; ++r) {
        for (Index i = 0; i < kWidth; ++i) {
          logit += problem.x(t, i) * params.hidden.weight(r, i) * params.output.weight(e, r);
        }
      }
      CHECK(decision.logits(t, e) == Catch::Approx(logit));
    }
    const auto& chosen = decision.experts[t];
    REQUIRE(chosen.size() == 2);
    const double ratio =
        std::exp((decision.logits(t, chosen[0]) - decision.logits(t, chosen[1])) / 0.5);
    CHECK(decision.gates[t][0] == Catch::Approx(ratio / (1 + ratio)));
  }
}

TEST_CASE("A task router looks at the id alone", "[routers]") {
  const test::RouterCase<mole::TaskRouter<double>> use(
      mole::TaskRouter<double>({.width = 3, .experts = 4, .tasks = 2, .task_width = 3}), {});
  auto problem = use.problem(5);
  problem.ids = {1, 0, 1, -1, 2};
  const auto gate = gates_of(use, problem);
  for (Index e = 0; e < 4; ++e) {
    CHECK(gate(0, e) == gate(2, e));
    CHECK(gate(0, e) != gate(1, e));
    CHECK(gate(3, e) == 0);
    CHECK(gate(4, e) == 0);
  }
  CHECK(gate(0, 0) + gate(0, 1) + gate(0, 2) + gate(0, 3) == Catch::Approx(1));
  problem.ids.clear();
  test::RouterCall<mole::TaskRouter<double>> call(use, problem);
  call.forward();
  CHECK(call.routing.slots() == 0);
}

TEST_CASE("Routers with learned heads refuse wrong configs by name", "[routers]") {
  using Catch::Matchers::Message;
  CHECK_THROWS_MATCHES(mole::MlpRouter<float>({.width = 3, .experts = 4, .hidden = 0}), mole::Error,
                       Message("MlpRouter: hidden: expected at least 1, got 0"));
  CHECK_THROWS_MATCHES(mole::MlpRouter<float>({.width = 3, .experts = 4, .hidden2 = -1}),
                       mole::Error, Message("MlpRouter: hidden2: expected at least 0, got -1"));
  CHECK_THROWS_MATCHES(mole::MlpRouter<float>({.width = 3, .experts = 4, .temperature = 0}),
                       mole::Error,
                       Message("MlpRouter: temperature: expected a positive number, got 0"));
  CHECK_THROWS_MATCHES(mole::LowRankRouter<float>({.width = 3, .experts = 4, .rank = 0}),
                       mole::Error, Message("LowRankRouter: rank: expected at least 1, got 0"));
  CHECK_THROWS_MATCHES(mole::LowRankRouter<float>({.width = 3, .experts = 4, .k = 5}), mole::Error,
                       Message("LowRankRouter: k: expected 1 ... experts, got 5"));
  CHECK_THROWS_MATCHES(mole::TaskRouter<float>({.width = 3, .experts = 4}), mole::Error,
                       Message("TaskRouter: tasks: expected at least 1, got 0"));
}

TEST_CASE("Heads refuse parameters of the wrong shape by name", "[routers]") {
  test::RouterCase<mole::TaskRouter<double>> use(
      mole::TaskRouter<double>({.width = 3, .experts = 4, .tasks = 2, .task_width = 3}), {});
  auto params = use.const_params();
  params.embedding.rows = 1;
  mole::Buffer block(use.router.prepared_bytes());
  mole::Workspace memory(block.span());
  CHECK_THROWS_AS(use.router.prepare(params, memory), mole::Error);
  const mole::MlpRouter<double> mlp({.width = 3, .experts = 4, .hidden = 5, .hidden2 = 2});
  test::RouterCase<mole::MlpRouter<double>> other(mlp, {});
  auto inner = other.const_params();
  inner.hidden2.weight.cols = 4;
  mole::Buffer room(mlp.prepared_bytes());
  mole::Workspace place(room.span());
  CHECK_THROWS_AS(mlp.prepare(inner, place), mole::Error);
}

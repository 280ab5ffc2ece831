// SPDX-License-Identifier: Apache-2.0
// The contract over routers with thresholds, fixed weights, noise or ids.
#include "contracts/router_table.hpp"
#include "mole/routers/hard_top_k.hpp"
#include "mole/routers/hash.hpp"
#include "mole/routers/learned_threshold.hpp"
#include "mole/routers/noisy_top_k.hpp"
#include "mole/routers/one_plus.hpp"
#include "mole/routers/scored_hash.hpp"
#include "mole/routers/straight_through.hpp"
#include "mole/routers/threshold.hpp"

namespace {

template <class Keep>
void each_router(Keep keep) {
  keep(ROUTER_ROW(ThresholdRouter, .width = 13, .experts = 7, .threshold = T(0.1)));
  keep(ROUTER_ROW(LearnedThresholdRouter, .width = 13, .experts = 7, .bias = true));
  keep(ROUTER_ROW(HardTopKRouter, .width = 13, .experts = 7, .k = 2, .bias = true));
  keep(ROUTER_ROW(StraightThroughRouter, .width = 13, .experts = 7, .k = 2, .renormalise = true));
  keep(ROUTER_ROW(StraightThroughRouter, .width = 13, .experts = 7, .probes = true));
  keep(ROUTER_ROW(OnePlusRouter, .width = 13, .experts = 7, .k = 3));
  keep(ROUTER_ROW(NoisyTopKRouter, .width = 13, .experts = 7, .k = 2));
  keep(ROUTER_ROW(NoisyTopKRouter, .width = 13, .experts = 7,
                  .order = mole::NoisyOrder::softmax_then_topk, .bias = true));
}

template <class R>
void keeps_by_id(const R& router) {
  test::router_contract(router, {.by_score = false});
}

}  // namespace

TEST_CASE("Routers with hard choices keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
}

TEST_CASE("Routers with hard choices give the same bits on threads", "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

TEMPLATE_TEST_CASE("Hash routers keep the router contract", "[routers]", float, double) {
  keeps_by_id(mole::HashRouter<TestType>({.width = 13, .experts = 7}));
  keeps_by_id(mole::ScoredHashRouter<TestType>({.width = 13, .experts = 7, .bias = true}));
}

TEMPLATE_TEST_CASE("OnePlusRouter weighs the best experts with 1 + their logits", "[routers]",
                   float, double) {
  using T = TestType;
  const mole::OnePlusRouter<T> router({.width = 2, .experts = 3, .k = 2});
  const std::vector<T> weight = {1, 0, 0, 1, -1, -1}, x = {T(0.25), T(-0.5), 0, 0};
  mole::Buffer memory(std::size_t{1} << 16);
  mole::Workspace workspace(memory.span());
  const auto prepared = router.prepare({{weight.data(), 3, 2}, {}}, workspace);
  mole::RoutingTable<T> table(workspace, 2, 3, router.max_per_token());
  router.forward(prepared, {}, {.x = {x.data(), 2, 2}}, {}, {}, table, {}, nullptr,
                 mole::Context{workspace});
  const mole::Routing<T> routing = table.view();
  // Logits 0.25, -0.5, 0.25 of the first token, zeros of the second: the plain sum of two experts.
  CHECK(std::vector<int>(routing.expert.begin(), routing.expert.end()) ==
        std::vector<int>{0, 2, 0, 1});
  CHECK(std::vector<T>(routing.gate.begin(), routing.gate.end()) ==
        std::vector<T>{T(1.25), T(1.25), 1, 1});
}

TEMPLATE_TEST_CASE("HashRouter goes by the id alone", "[routers]", float, double) {
  using T = TestType;
  const mole::HashRouter<T> router({.width = 1, .experts = 4, .k = 2});
  const std::vector<std::int32_t> table_of_ids = {3, 1, 2, 2, 9, 0}, ids = {0, 1, 2, 7, -1};
  typename mole::HashRouter<T>::Buffers buffers;
  buffers.table = {table_of_ids.data(), 3, 2};
  const std::vector<T> x(5);
  mole::Buffer memory(std::size_t{1} << 16);
  mole::Workspace workspace(memory.span());
  mole::RoutingTable<T> table(workspace, 5, 4, 2);
  router.forward({}, buffers, {.x = {x.data(), 5, 1}, .ids = ids}, {}, {}, table, {}, nullptr,
                 mole::Context{workspace});
  const mole::Routing<T> routing = table.view();
  // A repeated expert counts once, what is no expert and an id beyond the table have no slot.
  CHECK(std::vector<int>(routing.token_begin.begin(), routing.token_begin.end()) ==
        std::vector<int>{0, 2, 3, 4, 4, 4});
  CHECK(std::vector<int>(routing.expert.begin(), routing.expert.end()) ==
        std::vector<int>{1, 3, 2, 0});
  for (const T gate : routing.gate) CHECK(gate == T(0.5));
}

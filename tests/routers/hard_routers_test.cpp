// SPDX-License-Identifier: Apache-2.0
// The contract over routers with thresholds, fixed weights, noise or ids.
#include "contracts/router_table.hpp"
#include "mole/routers/hard_top_k.hpp"
#include "mole/routers/hash.hpp"
#include "mole/routers/noisy_top_k.hpp"
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

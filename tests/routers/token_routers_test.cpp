// SPDX-License-Identifier: Apache-2.0
// The contract over routers with linear logits that decide token by token.
#include "contracts/router_table.hpp"
#include "mole/routers/deepseek.hpp"
#include "mole/routers/relu.hpp"
#include "mole/routers/sigmoid.hpp"
#include "mole/routers/top_p.hpp"
#include "mole/routers/tsallis.hpp"

namespace {

template <class Keep>
void each_router(Keep keep) {
  keep(ROUTER_ROW(TopPRouter, .width = 13, .experts = 7));
  keep(ROUTER_ROW(TopPRouter, .width = 13, .experts = 67, .top_p = T(0.6), .min_experts = 2,
                  .max_experts = 9, .temperature = T(1.5), .bias = true));
  keep(ROUTER_ROW(TopPRouter, .width = 13, .experts = 7, .include_crossing = false,
                  .renormalise = true));
  keep(ROUTER_ROW(TsallisRouter, .width = 13, .experts = 7));
  keep(ROUTER_ROW(TsallisRouter, .width = 13, .experts = 7, .entropy = mole::EntropyKind::renyi,
                  .entropy_index = T(2), .entropy_threshold = T(0.7), .bias = true));
  keep(ROUTER_ROW(DeepSeekRouter, .width = 13, .experts = 12, .k = 3, .groups = 4,
                  .keep_groups = 2));
  keep(ROUTER_ROW(DeepSeekRouter, .width = 13, .experts = 7, .k = 2, .score = mole::Score::softmax,
                  .renormalise = false, .route_scale = T(2.5), .bias = true));
  keep(ROUTER_ROW(SigmoidRouter, .width = 13, .experts = 7, .scale = T(1.5)));
  keep(ROUTER_ROW(SigmoidRouter, .width = 13, .experts = 7, .renormalise = true, .bias = true));
  keep(ROUTER_ROW(ReluRouter, .width = 13, .experts = 7, .bias = true));
}

}  // namespace

TEST_CASE("Routers that score every token on its own keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
}

TEST_CASE("Routers that score every token on its own give the same bits on threads",
          "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

// SPDX-License-Identifier: Apache-2.0
// The contract over routers in which tokens compete. Capacities are large where the suite asks for
// ties to go to the lower expert: a full expert would send the token on.
#include "contracts/router_table.hpp"
#include "mole/routers/expert_choice.hpp"
#include "mole/routers/gshard.hpp"
#include "mole/routers/sinkhorn.hpp"
#include "mole/routers/switch.hpp"
#include "mole/routers/top_k_capacity.hpp"

namespace {

template <class Keep>
void each_router(Keep keep) {
  using mole::ExpertChoiceScore;
  keep(ROUTER_ROW(SwitchRouter, .width = 13, .experts = 7, .capacity = 3, .bias = true));
  keep(ROUTER_ROW(GShardRouter, .width = 13, .experts = 7, .capacity = 200));
  keep(ROUTER_ROW(GShardRouter, .width = 13, .experts = 7, .capacity = 200,
                  .renormalise_before_drop = false, .by_gate = true, .bias = true));
  keep(ROUTER_ROW(TopKCapacityRouter, .width = 13, .experts = 7, .k = 3, .capacity = 5));
  keep(ROUTER_ROW(TopKCapacityRouter, .width = 13, .experts = 7, .capacity = 200,
                  .over_selection = true, .renormalise = true, .drop = mole::DropBy::position));
  keep(ROUTER_ROW(ExpertChoiceRouter, .width = 13, .experts = 7, .capacity_factor = 2));
  keep(ROUTER_ROW(ExpertChoiceRouter, .width = 13, .experts = 7, .capacity_factor = 2,
                  .score = ExpertChoiceScore::over_tokens));
  keep(ROUTER_ROW(ExpertChoiceRouter, .width = 13, .experts = 7, .capacity_factor = 2,
                  .score = ExpertChoiceScore::over_selected, .bias = true));
  keep(ROUTER_ROW(SinkhornRouter, .width = 13, .experts = 7));
  keep(ROUTER_ROW(SinkhornRouter, .width = 13, .experts = 7, .k = 2, .bias = true));
}

}  // namespace

TEST_CASE("Routers in which tokens compete keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
}

TEST_CASE("Routers in which tokens compete give the same bits on threads", "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

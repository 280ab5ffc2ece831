// SPDX-License-Identifier: Apache-2.0
// The skeletons keep the contracts of the library's own routers and banks.
#include "contracts/bank_contract.hpp"
#include "contracts/router_contract.hpp"
#include "skeletons/dora_bank.hpp"
#include "skeletons/rank_wise.hpp"

namespace skeleton {

TEST_CASE("the router skeleton keeps the router contract", "[skeletons]") {
  using Router = ContentRouter<double>;
  const test::RouterCase<Router> use(Router({.ranks = 7, .k = 3, .temperature = 0.3}), {});
  for (const auto& named : test::router_checks::all<Router>()) {
    // Ties come from parameters that are 0, and here are none; golden cases have ties in x.
    if (std::string(named.rule) == "ties go to the lower expert") continue;
    INFO(named.rule);
    CHECK(test::router_checks::run(named, use) == "");
  }
}

TEST_CASE("the bank skeleton keeps the bank contract", "[skeletons]") {
  test::bank_contract(DoraBank<double>(
      {.in = 11, .out = 7, .rank = {3, 2, 0, 5, 1}, .scale = {0.5, 2, 1, -0.75, 1.5}}));
}

}  // namespace skeleton

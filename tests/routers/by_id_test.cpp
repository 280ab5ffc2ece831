// SPDX-License-Identifier: Apache-2.0
#include "contracts/router_table.hpp"
#include "mole/routers/one_plus_by_id.hpp"

using mole::Index;
using mole::OnePlusByIdRouter;

namespace {

template <class Keep>
void each_router(Keep keep) {
  keep(ROUTER_ROW(OnePlusByIdRouter, .width = 13, .experts = 7, .k = 3, .heads = 1));
  keep(ROUTER_ROW(OnePlusByIdRouter, .width = 13, .experts = 7, .k = 2, .heads = 3, .bias = true));
}

}  // namespace

TEST_CASE("Routers with heads by id keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
}

TEST_CASE("Routers with heads by id give the same bits on threads", "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

TEMPLATE_TEST_CASE("OnePlusByIdRouter routes every token by the head of its id", "[routers]", float,
                   double) {
  using T = TestType;
  const OnePlusByIdRouter<T> router({.width = 1, .experts = 2, .k = 1, .heads = 2});
  const std::vector<T> weight = {1, 2, -1, -3}, x = {2, 2, 2, 2};
  const std::vector<std::int32_t> ids = {0, 1, 3, -1};  // 3 is of head 1, -1 of none
  mole::Buffer memory(std::size_t{1} << 16);
  mole::Workspace workspace(memory.span());
  const auto prepared = router.prepare({{weight.data(), 4, 1}, {}}, workspace);
  mole::RoutingTable<T> table(workspace, 4, 2, router.max_per_token());
  const mole::Context context{workspace};
  const auto gates = [&](std::span<const std::int32_t> of) {
    router.forward(prepared, {}, {.x = {x.data(), 4, 1}, .ids = of}, {}, {}, table, {}, nullptr,
                   context);
    return std::vector<T>(table.view().gate.begin(), table.view().gate.end());
  };
  CHECK(gates(ids) == std::vector<T>{5, -1, -1});
  CHECK(table.view().token_begin.back() == table.view().token_begin[3]);
  CHECK(gates({}) == std::vector<T>{5, 5, 5, 5});
}

TEST_CASE("OnePlusByIdRouter refuses what does not fit, by name", "[routers]") {
  const auto refused = [](const OnePlusByIdRouter<double>::Config& config) {
    try {
      const OnePlusByIdRouter<double> router(config);
    } catch (const mole::Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  using Catch::Matchers::ContainsSubstring;
  CHECK(refused({.width = 3, .experts = 2, .k = 2}) == "accepted");
  CHECK_THAT(refused({.width = 3, .experts = 2, .k = 2, .heads = 0}),
             ContainsSubstring("heads: expected at least 1, got 0"));
  CHECK_THAT(refused({.width = 3, .experts = 2, .k = 3}),
             ContainsSubstring("k: expected 1 ... experts, got 3"));
}

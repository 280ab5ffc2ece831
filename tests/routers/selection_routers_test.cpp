// SPDX-License-Identifier: Apache-2.0
// Routers that take given places of the order, the best of every group, named experts, random ones,
// or all that are best.
#include <map>
#include <set>

#include "contracts/router_table.hpp"
#include "mole/routers/forced.hpp"
#include "mole/routers/grouped.hpp"
#include "mole/routers/near_best.hpp"
#include "mole/routers/random.hpp"
#include "mole/routers/rank.hpp"

namespace {

using mole::Index;

template <class Keep>
void each_router(Keep keep) {
  keep(ROUTER_ROW(RankRouter, .width = 13, .experts = 7, .positions = {0, 1}));
  keep(ROUTER_ROW(RankRouter, .width = 13, .experts = 67, .positions = {0, 1, 2, 3, 4, 5},
                  .renormalise = false, .threshold = T(0.2), .bias = true));
  keep(ROUTER_ROW(NearBestRouter, .width = 13, .experts = 7));
  keep(ROUTER_ROW(NearBestRouter, .width = 13, .experts = 67, .margin = T(0.01), .bias = true));
}

template <class R>
auto run(const R& router, const typename R::Buffers& buffers, Index tokens,
         std::span<const std::int32_t> ids = {}) {
  const test::RouterCase<R> use(router, {.buffers = buffers});
  auto problem = use.problem(tokens);
  problem.ids.assign(ids.begin(), ids.end());
  return test::decide(use, problem);
}

}  // namespace

TEST_CASE("Routers by rank and near the best keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
}

TEST_CASE("Routers by rank and near the best give the same bits on threads", "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

TEMPLATE_TEST_CASE("Forced and random routers keep the router contract", "[routers]", float,
                   double) {
  using T = TestType;
  const test::Matrix<std::int32_t> same(101, 2, [](Index, Index i) { return i == 0 ? 5 : 2; });
  typename mole::ForcedRouter<T>::Buffers buffers{same};
  const mole::ForcedRouter<T> forced({.width = 13, .experts = 7, .k = 2, .gate = T(0.5)});
  test::router_contract(forced, {.buffers = buffers, .by_score = false});
  const mole::RandomRouter<T> random({.width = 13, .experts = 67, .k = 3, .seed = 5});
  test::router_contract(random, {.buffers = {.call = 9}, .by_score = false});
}

// Every group has its own lowest expert: ties are looked at below.
TEMPLATE_TEST_CASE("Grouped routers keep the router contract", "[routers]", float, double) {
  using Router = mole::GroupedRouter<TestType>;
  test::router_contract(Router({.width = 13, .experts = 6}), {.by_score = false});
  test::router_contract(Router({.width = 13,
                                .experts = 66,
                                .groups = 3,
                                .k = 4,
                                .renormalise = true,
                                .scale = TestType(0.5),
                                .bias = true}),
                        {.by_score = false});
}

TEST_CASE("Grouped routers give the same bits on threads", "[routers][threads]") {
  test::router_threads_contract(
      mole::GroupedRouter<float>({.width = 13, .experts = 66, .groups = 3, .k = 2}));
}

TEST_CASE("Ties go to the lower expert of the group", "[routers]") {
  using Router = mole::GroupedRouter<double>;
  test::RouterCase<Router> use(Router({.width = 3, .experts = 6, .k = 2}), {});
  use.fill_params([] { return 0.0; });
  const auto decision = test::decide(use, use.problem(2));
  CHECK(decision.experts[1] == std::vector<std::int32_t>{0, 1, 3, 4});
}

TEST_CASE("Forced and random routers give the same bits on threads", "[routers][threads]") {
  const mole::RandomRouter<double> random({.width = 13, .experts = 7, .k = 3});
  test::router_threads_contract(random, {.by_score = false});
}

TEST_CASE("A rank router takes the places it was given", "[routers]") {
  using Router = mole::RankRouter<double>;
  const test::RouterCase<Router> use(
      Router({.width = 4, .experts = 5, .positions = {3, 1}, .renormalise = false}), {});
  const auto decision = test::decide(use, use.problem(6));
  for (Index t = 0; t < 6; ++t) {
    REQUIRE(decision.experts[t].size() == 2);
    std::set<Index> places;
    for (std::size_t i = 0; i < 2; ++i) {
      const auto e = decision.experts[t][i];
      Index better = 0;
      for (Index other = 0; other < 5; ++other) {
        better += decision.logits(t, other) > decision.logits(t, e);
      }
      places.insert(better);
      CHECK(decision.gates[t][i] == decision.prob(t, e));
    }
    CHECK(places == std::set<Index>{1, 3});
  }
}

TEST_CASE("A forced router takes what it is told, once, and leaves out what is forbidden",
          "[routers]") {
  using Router = mole::ForcedRouter<double>;
  const Router router({.width = 3, .experts = 4, .k = 2});
  const test::Matrix<std::int32_t> given(4, 2, [](Index t, Index i) {
    const std::int32_t rows[4][2] = {{3, 1}, {-1, 2}, {0, 0}, {-1, -1}};
    return rows[t][i];
  });
  const auto decision = run<Router>(router, {given}, 4);
  CHECK(decision.experts[0] == std::vector<std::int32_t>{1, 3});
  CHECK(decision.experts[1] == std::vector<std::int32_t>{2});
  CHECK(decision.experts[2] == std::vector<std::int32_t>{0});
  CHECK(decision.experts[3].empty());
  CHECK(decision.gates[0] == std::vector<double>{1, 1});
  const test::Matrix<std::int32_t> bad(1, 2, [](Index, Index) { return 4; });
  CHECK_THROWS_AS(run<Router>(router, {bad}, 1), mole::Error);
  CHECK_THROWS_AS(run<Router>(router, {given}, 5), mole::Error);
  CHECK_THROWS_AS(run<Router>(router, {given.view().col_block(0, 1)}, 4), mole::Error);
}

TEST_CASE("A random router draws every set of experts, by seed, call and id", "[routers]") {
  using Router = mole::RandomRouter<double>;
  const Router router({.width = 3, .experts = 5, .k = 2, .gate = 0.5, .seed = 1});
  const auto decision = run<Router>(router, {.call = 3}, 400);
  std::map<std::vector<std::int32_t>, int> seen;
  for (const auto& experts : decision.experts) {
    REQUIRE(experts.size() == 2);
    ++seen[experts];
  }
  CHECK(seen.size() == 10);
  for (const auto& [experts, times] : seen) CHECK((times > 15 && times < 75));
  CHECK(run<Router>(router, {.call = 3}, 400).experts == decision.experts);
  CHECK(run<Router>(router, {.call = 4}, 400).experts != decision.experts);
  const std::vector<std::int32_t> ids = {17, 3};
  const auto by_id = run<Router>(router, {.call = 3}, 2, ids);
  CHECK(by_id.experts[0] == decision.experts[17]);
  CHECK(by_id.experts[1] == decision.experts[3]);
}

TEST_CASE("Experts as good as the best work with it", "[routers]") {
  using Router = mole::NearBestRouter<double>;
  test::RouterCase<Router> use(Router({.width = 2, .experts = 3}), {});
  auto& weight = use.params.weight;
  for (Index i = 0; i < 2; ++i) weight(2, i) = weight(0, i);
  use.prepare();
  const auto problem = use.problem(8);
  const auto decision = test::decide(use, problem);
  for (Index t = 0; t < 8; ++t) {
    const bool one = decision.logits(t, 1) > decision.logits(t, 0);
    CHECK(decision.experts[t] ==
          (one ? std::vector<std::int32_t>{1} : std::vector<std::int32_t>{0, 2}));
    for (const double gate : decision.gates[t]) CHECK(gate == 1);
  }
}

TEST_CASE("A grouped router routes in every group as a top-k router of its own", "[routers]") {
  using Router = mole::GroupedRouter<double>;
  const test::RouterCase<Router> use(
      Router({.width = 4, .experts = 6, .groups = 2, .k = 2, .scale = 3}), {});
  const auto problem = use.problem(8);
  const auto decision = test::decide(use, problem);
  for (Index t = 0; t < 8; ++t) {
    REQUIRE(decision.experts[t].size() == 4);
    for (const Index first : {0, 3}) {
      double sum = 0, least = 1;
      for (Index e = first; e < first + 3; ++e) sum += std::exp(decision.logits(t, e));
      for (Index e = first; e < first + 3; ++e) {
        const double p = std::exp(decision.logits(t, e)) / sum;
        CHECK(decision.prob(t, e) == Catch::Approx(p));
        least = std::min(least, p);
      }
      for (std::size_t i = 0; i < 4; ++i) {
        const Index e = decision.experts[t][i];
        if (e < first || e >= first + 3) continue;
        CHECK(decision.gates[t][i] == Catch::Approx(3 * decision.prob(t, e)));
        CHECK(decision.prob(t, e) > least);
      }
    }
  }
}

TEST_CASE("Selection routers refuse wrong configs by name", "[routers]") {
  using Catch::Matchers::Message;
  const auto rank = [](std::vector<Index> positions) {
    return mole::RankRouter<float>({.width = 3, .experts = 4, .positions = std::move(positions)});
  };
  CHECK_THROWS_MATCHES(rank({}), mole::Error,
                       Message("RankRouter: positions: expected at least one, got 0"));
  CHECK_THROWS_MATCHES(
      rank({1, 4}), mole::Error,
      Message("RankRouter: positions: expected distinct numbers in 0 ... experts - 1, got 4"));
  CHECK_THROWS_AS(rank({1, 1}), mole::Error);
  CHECK_THROWS_MATCHES(mole::ForcedRouter<float>({.width = 3, .experts = 4, .k = 5}), mole::Error,
                       Message("ForcedRouter: k: expected 1 ... experts, got 5"));
  CHECK_THROWS_MATCHES(mole::RandomRouter<float>({.width = 3, .experts = 4, .k = 0}), mole::Error,
                       Message("RandomRouter: k: expected 1 ... experts, got 0"));
  CHECK_THROWS_MATCHES(mole::GroupedRouter<float>({.width = 3, .experts = 5}), mole::Error,
                       Message("GroupedRouter: groups: expected a divisor of experts, got 2"));
  CHECK_THROWS_MATCHES(mole::GroupedRouter<float>({.width = 3, .experts = 4, .k = 3}), mole::Error,
                       Message("GroupedRouter: k: expected 1 ... experts of a group, got 3"));
  CHECK_THROWS_MATCHES(mole::NearBestRouter<float>({.width = 3, .experts = 4, .margin = 0}),
                       mole::Error,
                       Message("NearBestRouter: margin: expected a positive number, got 0"));
}

TEST_CASE("Pieces of a context are picked by rows of the identity", "[routers]") {
  test::Matrix<double> down(2, 6);
  mole::fill_piece(down.view(), 1);
  for (Index r = 0; r < 2; ++r) {
    for (Index c = 0; c < 6; ++c) CHECK(down(r, c) == (c == 2 + r ? 1 : 0));
  }
  CHECK_THROWS_AS(mole::fill_piece(down.view(), 3), mole::Error);
  CHECK_THROWS_AS(mole::fill_piece(down.view(), -1), mole::Error);
}

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/base.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "contracts/router_table.hpp"

namespace {

using mole::Index;
using test::Matrix;
using Experts = std::vector<std::int32_t>;  // of every token, -1: none

template <class T>
void keep_the_contract(const typename mole::BaseRouter<T>::Config& config) {
  const mole::BaseRouter<T> router(config);
  // Equal tokens are shared out among the experts, so that not all of them get the lowest one.
  test::router_contract(router, {.by_score = false});
  test::router_contract(router, {.buffers = {.balance = false}});
}

/// Logits with many ties.
Matrix<double> coarse_logits(Index tokens, Index experts, std::uint64_t seed) {
  const mole::Random random(seed, 3);
  return Matrix<double>(tokens, experts, [&](Index t, Index e) {
    return 0.5 * static_cast<double>(random.below(static_cast<std::uint64_t>(t * experts + e), 9)) -
           2;
  });
}

struct Call {
  bool balance = true;
  mole::Overrides<double> overrides = {};
  std::vector<std::uint8_t> mask = {};
};

/// What a router decides whose logits are x.
Experts route(const Matrix<double>& logits, const Call& call = {}) {
  const Index tokens = logits.rows(), experts = logits.cols();
  const mole::BaseRouter<double> router({.width = experts, .experts = experts});
  test::Dirty memory(router.params_bytes() + router.prepared_bytes() +
                     mole::RoutingTable<double>::bytes(tokens, experts, 1));
  test::Dirty scratch(router.scratch_bytes(tokens, 1));
  const auto params = router.make_params(memory.workspace());
  for (Index r = 0; r < experts; ++r) {
    for (Index c = 0; c < experts; ++c) params.weight(r, c) = r == c ? 1 : 0;
  }
  const auto prepared = router.prepare(params, memory.workspace());
  mole::RoutingTable<double> table(memory.workspace(), tokens, experts, 1);
  router.forward(prepared, {.balance = call.balance}, {.x = logits, .mask = call.mask},
                 call.overrides, {}, table, {}, nullptr, {.scratch = scratch.workspace()});
  const mole::Routing<double> routing = table.view();
  Experts found;
  for (Index t = 0; t < tokens; ++t) {
    const Index slot = routing.token_begin[t];
    if (routing.token_begin[t + 1] == slot) {
      found.push_back(-1);
      continue;
    }
    found.push_back(routing.expert[slot]);
    const double expected = 1 / (1 + std::exp(-logits(t, found.back())));
    CHECK(routing.gate[slot] == Catch::Approx(expected).epsilon(1e-14));
  }
  return found;
}

/// The rule as it is stated: again and again the best of all pairs that can be taken.
Experts restated(const Matrix<double>& logits, Index share, const auto& is_available) {
  Experts expert(static_cast<std::size_t>(logits.rows()), -1);
  std::vector<Index> load(static_cast<std::size_t>(logits.cols()), 0);
  for (;;) {
    Index token = -1, chosen = -1;
    for (Index t = 0; t < logits.rows(); ++t) {
      for (Index e = 0; e < logits.cols(); ++e) {
        if (expert[t] >= 0 || load[e] == share || !is_available(t, e)) continue;
        if (token < 0 || logits(t, e) > logits(token, chosen)) token = t, chosen = e;
      }
    }
    if (token < 0) return expert;
    expert[token] = static_cast<std::int32_t>(chosen);
    ++load[chosen];
  }
}

Index count(const Experts& experts, std::int32_t expert) {
  return std::count(experts.begin(), experts.end(), expert);
}

}  // namespace

TEST_CASE("BaseRouter keeps the router contract, shared out and at inference", "[routers]") {
  keep_the_contract<float>({.width = 13, .experts = 7});
  keep_the_contract<double>({.width = 13, .experts = 7, .bias = true});
  keep_the_contract<float>({.width = 13, .experts = 67, .bias = true});
  keep_the_contract<double>({.width = 13, .experts = 67});
}

TEST_CASE("BaseRouter gives the same bits on threads", "[routers][threads]") {
  test::router_threads_contract(mole::BaseRouter<float>({.width = 13, .experts = 7}));
  test::router_threads_contract(mole::BaseRouter<double>({.width = 13, .experts = 7}));
}

TEST_CASE("BaseRouter takes the best pair that is left, again and again", "[routers]") {
  const auto all = [](Index, Index) { return true; };
  std::uint64_t seed = 0;
  for (const auto& [tokens, experts] : std::vector<std::pair<Index, Index>>{
           {24, 4}, {23, 5}, {40, 3}, {3, 7}, {7, 7}, {1, 1}, {29, 2}, {61, 13}}) {
    INFO(tokens << " tokens, " << experts << " experts");
    const Index share = (tokens + experts - 1) / experts;
    for (int round = 0; round < 5; ++round) {
      const auto logits = coarse_logits(tokens, experts, ++seed);
      const Experts found = route(logits);
      CHECK(found == restated(logits, share, all));
      CHECK(count(found, -1) == 0);
      for (std::int32_t e = 0; e < experts; ++e) {
        CHECK(count(found, e) <= share);
        if (tokens % experts == 0) CHECK(count(found, e) == share);
      }
    }
  }
}

TEST_CASE("among equal pairs BaseRouter takes the earlier token and the lower expert",
          "[routers]") {
  CHECK(route(Matrix<double>(7, 3)) == Experts{0, 0, 0, 1, 1, 1, 2});
  const auto last_is_best =
      Matrix<double>(5, 2, [](Index t, Index) { return t == 4 ? 1.0 : -1.0; });
  CHECK(route(last_is_best) == Experts{0, 0, 1, 1, 0});
}

TEST_CASE("a token whose available experts are full has no slot", "[routers]") {
  const Index tokens = 9, experts = 3;
  const auto logits = coarse_logits(tokens, experts, 77);
  const auto is_available = [](Index t, Index e) { return t % 4 == 0 || e == 1; };
  const Matrix<std::uint8_t> forbidden(tokens, experts,
                                       [&](Index t, Index e) { return !is_available(t, e); });
  const Experts found = route(logits, {.overrides = {.forbidden = forbidden}});
  CHECK(found == restated(logits, 3, is_available));
  CHECK(count(found, 1) == 3);
  CHECK(count(found, -1) >= 3);

  const std::vector<std::int32_t> forced = {2, 2, -1, 2, 2, 2, -1, -1, -1};
  const Experts obeyed = route(logits, {.overrides = {.forced = forced}});
  const auto is_forced = [&](Index t, Index e) { return forced[t] < 0 || forced[t] == e; };
  CHECK(obeyed == restated(logits, 3, is_forced));
  for (std::size_t t = 0; t < forced.size(); ++t) {
    if (forced[t] >= 0) CHECK((obeyed[t] == forced[t] || obeyed[t] == -1));
  }
}

TEST_CASE("logits that are not finite take part as the policy says", "[routers]") {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Matrix<double> bias(4, 2);
  bias(0, 1) = -kInfinity;
  bias(1, 0) = bias(1, 1) = std::numeric_limits<double>::quiet_NaN();
  bias(3, 0) = kInfinity;
  const mole::BaseRouter<double> router({.width = 2, .experts = 2});
  test::RouterCase<mole::BaseRouter<double>> use(router, {});
  use.fill_params([] { return 0.0; });
  auto problem = use.problem(4);
  problem.logit_bias = bias;
  const auto decision = test::decide(use, problem);
  CHECK(decision.experts == std::vector<Experts>{{0}, {}, {1}, {0}});
  CHECK(decision.gates[3] == std::vector<double>{1});
}

TEST_CASE("padding has no expert and takes no place", "[routers]") {
  const auto logits = coarse_logits(12, 3, 5);
  std::vector<std::uint8_t> mask(12, 1);
  for (const Index t : {1, 2, 5, 6, 9, 11}) mask[t] = 0;
  const auto is_real = [&](Index t, Index) { return mask[t] != 0; };
  const Experts found = route(logits, {.mask = mask});
  CHECK(found == restated(logits, 2, is_real));
  CHECK(count(found, -1) == 6);
  for (std::int32_t e = 0; e < 3; ++e) CHECK(count(found, e) == 2);
  const Experts served = route(logits, {.balance = false, .mask = mask});
  CHECK(served == restated(logits, 12, is_real));
  CHECK(route(logits, {.mask = std::vector<std::uint8_t>(12, 0)}) == Experts(12, -1));
}

TEST_CASE("at inference BaseRouter takes every token's best expert, whoever else is there",
          "[routers]") {
  const auto logits = coarse_logits(31, 4, 9);
  const Experts found = route(logits, {.balance = false});
  for (Index t = 0; t < logits.rows(); ++t) {
    const auto row = logits.view().row(t);
    CHECK(found[t] == std::max_element(row.begin(), row.end()) - row.begin());
    const Matrix<double> alone(1, 4, [&](Index, Index e) { return logits(t, e); });
    CHECK(route(alone, {.balance = false}) == Experts{found[t]});
  }
  CHECK_FALSE(found == route(logits));
}

TEST_CASE("BaseRouter refuses sizes below one", "[routers]") {
  CHECK_THROWS_WITH(mole::BaseRouter<float>({.width = 0, .experts = 2}),
                    "BaseRouter: width: expected at least 1, got 0");
  CHECK_THROWS_WITH(mole::BaseRouter<float>({.width = 2, .experts = 0}),
                    "BaseRouter: experts: expected at least 1, got 0");
}

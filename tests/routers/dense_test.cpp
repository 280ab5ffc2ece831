// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/dense.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "contracts/router_contract.hpp"
#include "support/reference.hpp"

namespace {

using mole::DenseRouter;
using mole::Index;
using test::Matrix;

template <class T>
std::vector<DenseRouter<T>> routers() {
  using R = DenseRouter<T>;
  return {R({.width = 13, .experts = 7}), R({.width = 5, .experts = 1}),
          R({.width = 3, .experts = 67, .temperature = T(0.5), .bias = true})};
}

}  // namespace

TEST_CASE("DenseRouter keeps the router contract", "[routers]") {
  for (const auto& router : routers<float>()) test::router_contract(router);
  for (const auto& router : routers<double>()) test::router_contract(router);
}

TEST_CASE("DenseRouter gives the same bits on every thread", "[routers][threads]") {
  test::router_threads_contract(DenseRouter<float>({.width = 13, .experts = 67}));
  test::router_threads_contract(DenseRouter<double>({.width = 13, .experts = 7}));
}

TEST_CASE("DenseRouter is a softmax over all experts", "[routers]") {
  using R = DenseRouter<double>;
  const R router({.width = 13, .experts = 7, .temperature = 0.5});
  const test::RouterCase<R> use(router, {});
  const auto problem = use.problem(5);
  const Matrix<double> weight(7, 13, [&](Index e, Index i) {
    return use.params.weight(e, i) / router.config().temperature;
  });
  const auto logits = test::reference::logits(problem.x, weight, {});
  const auto decision = test::decide(use, problem);
  for (Index t = 0; t < 5; ++t) {
    const auto want = test::reference::softmax(test::reference::row_of(logits, t));
    CHECK(test::difference(decision.gates[t], want, {1e-13, 1e-14}) == "");
    CHECK(test::bit_difference(decision.prob.view().row(t), decision.gates[t]) == "");
  }
}

TEST_CASE("a dense router gives experts that are not available no slot", "[routers]") {
  using R = DenseRouter<float>;
  const test::RouterCase<R> use(R({.width = 3, .experts = 4}), {});
  auto problem = use.problem(2);
  problem.logit_bias = Matrix<float>(1, 4);
  problem.logit_bias(0, 1) = std::numeric_limits<float>::quiet_NaN();
  problem.logit_bias(0, 3) = -std::numeric_limits<float>::infinity();
  const auto decision = test::decide(use, problem);
  for (Index t = 0; t < 2; ++t) {
    CHECK(decision.experts[t] == std::vector<std::int32_t>{0, 2});
    CHECK(decision.gates[t][0] + decision.gates[t][1] == Catch::Approx(1));
    CHECK(decision.prob(t, 1) == 0);
  }
}

TEST_CASE("a probability that underflows is a probe", "[routers]") {
  using R = DenseRouter<float>;
  const test::RouterCase<R> use(R({.width = 3, .experts = 2}), {});
  auto problem = use.problem(1);
  problem.logit_bias = Matrix<float>(1, 2, [](Index, Index e) { return e == 0 ? 800 : -800; });
  const auto decision = test::decide(use, problem);
  CHECK(decision.experts[0] == std::vector<std::int32_t>{0, 1});
  CHECK(decision.gates[0] == std::vector<float>{1, 0});
}

TEST_CASE("DenseRouter names the field of a bad configuration", "[routers]") {
  using R = DenseRouter<double>;
  CHECK_THROWS_WITH(R({.width = 0, .experts = 1}),
                    "DenseRouter: width: expected at least 1, got 0");
  CHECK_THROWS_WITH(R({.width = 1, .experts = 0}),
                    "DenseRouter: experts: expected at least 1, got 0");
  CHECK_THROWS_WITH(R({.width = 1, .experts = 1, .temperature = 0}),
                    "DenseRouter: temperature: expected a positive number, got 0");
  CHECK_THROWS_WITH(R({.width = 1, .experts = 1, .temperature = std::nan("")}),
                    "DenseRouter: temperature: expected a positive number, got nan");
}

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/given.hpp"

#include <limits>
#include <vector>

#include "contracts/router_contract.hpp"

namespace {

using mole::GivenRouter;
using mole::Index;
using test::Matrix;
using R = GivenRouter<double>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// A router of four experts and one token with these gates.
struct Given {
  explicit Given(const std::vector<double>& gates)
      : use(R({.width = 3, .experts = 4}), {.given_gates = true}), problem(use.problem(1)) {
    problem.gates = Matrix<double>(1, 4, [&](Index, Index e) { return gates[e]; });
  }
  test::RouterCase<R> use;
  test::RouterProblem<double> problem;
};

}  // namespace

TEST_CASE("GivenRouter keeps the router contract", "[routers]") {
  const auto check = []<class T>(T) {
    test::router_contract(GivenRouter<T>({.width = 5, .experts = 7}), {.given_gates = true});
  };
  check(float());
  check(double());
}

TEST_CASE("GivenRouter gives the same bits on every thread", "[routers][threads]") {
  test::router_threads_contract(R({.width = 5, .experts = 7}), {.given_gates = true});
}

TEST_CASE("given gates become slots, zeros become probes", "[routers]") {
  const Given given({0.5, 0, -2, 0});
  const auto decision = test::decide(given.use, given.problem);
  CHECK(decision.experts[0] == std::vector<std::int32_t>{0, 1, 2, 3});
  CHECK(decision.gates[0] == std::vector<double>{0.5, 0, -2, 0});
  CHECK(decision.active(0) == std::vector<std::int32_t>{0, 2});
  CHECK(test::bit_difference(decision.prob.view().row(0), decision.gates[0]) == "");
}

TEST_CASE("the gradient of given gates is added to that of the probabilities", "[routers]") {
  Given given({0.5, 0, kNan, 3});
  given.problem.forbidden = Matrix<std::uint8_t>(1, 4, [](Index, Index e) { return e == 3; });
  test::RouterCall<R> call(given.use, given.problem);
  call.forward();
  CHECK(call.decision().experts[0] == std::vector<std::int32_t>{0, 1});
  call.set_upstream();
  call.backward();
  const auto upstream = test::RouterCall<R>::upstream;
  for (Index e = 0; e < 4; ++e) {
    const double gate = e < 2 ? upstream(0, e, 3) : 0;
    CHECK(call.d_tape().prob(0, e) == upstream(0, e, 1) + gate);
  }
}

TEST_CASE("a given gate that is not finite is no slot", "[routers]") {
  const Given given({kNan, 1, std::numeric_limits<double>::infinity(), 2});
  CHECK(test::decide(given.use, given.problem).experts[0] == std::vector<std::int32_t>{1, 3});
}

TEST_CASE("GivenRouter says what it misses", "[routers]") {
  Given given({1, 2, 3, 4});
  auto problem = given.problem;
  problem.gates = {};
  CHECK_THROWS_WITH(test::decide(given.use, problem),
                    "overrides.gates: a GivenRouter needs them, expected [1, 4]");
  problem = given.problem;
  problem.logit_bias = Matrix<double>(1, 4);
  CHECK_THROWS_WITH(test::decide(given.use, problem),
                    "overrides.logit_bias: a GivenRouter has no logits");
  CHECK_THROWS_WITH(R({.width = 0, .experts = 0}),
                    "GivenRouter: experts: expected at least 1, got 0");
  CHECK_THROWS_WITH(R({.width = -1, .experts = 2}),
                    "GivenRouter: width: expected at least 0, got -1");
}

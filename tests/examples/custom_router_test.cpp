// SPDX-License-Identifier: Apache-2.0
// The router of examples/04_custom_router.hpp, a stranger's, passes the contract suite.
#include "../../examples/04_custom_router.hpp"

#include "contracts/router_contract.hpp"

TEMPLATE_TEST_CASE("The router of the example keeps the router contract", "[examples]", float,
                   double) {
  test::router_contract(ThresholdRouter<TestType>({.width = 13, .experts = 7}));
}

TEMPLATE_TEST_CASE("The router of the example keeps the router contract on threads",
                   "[examples][threads]", float, double) {
  test::router_threads_contract(ThresholdRouter<TestType>({.width = 13, .experts = 7}));
}

TEST_CASE("The router of the example selects what is above its threshold", "[examples]") {
  const ThresholdRule<double> rule{0.5};
  const std::vector<double> logits = {2.0, -1.0, 0.0, 0.5};
  std::vector<double> prob(4), gate(4);

  rule.forward(logits, prob, gate);

  CHECK(gate[0] == 1 / (1 + std::exp(-2.0)) - 0.5);
  CHECK(gate[1] == 0);
  CHECK(gate[2] == 0);
  CHECK(gate[3] > 0);
}

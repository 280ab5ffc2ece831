// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "mole/routing/tokens.hpp"
#include "support/catch.hpp"
#include "support/matrix.hpp"

using mole::Overrides;
using test::Matrix;

TEST_CASE("overrides fit as one row or a row for every token", "[routing]") {
  const Matrix<float> one(1, 4), all(3, 4);
  const Matrix<std::uint8_t> forbidden(1, 4);
  const std::vector<std::int32_t> forced = {-1, 0, 3};
  CHECK_NOTHROW(check_overrides(Overrides<float>{}, 3, 4));
  CHECK_NOTHROW(check_overrides(
      Overrides<float>{.logit_bias = one, .forbidden = forbidden, .forced = forced, .gates = all},
      3, 4));
  CHECK_NOTHROW(check_overrides(Overrides<float>{.logit_bias = all}, 3, 4));
}

TEST_CASE("overrides of another shape are refused by name", "[routing]") {
  const Matrix<float> bias(2, 4), one(1, 4);
  const Matrix<std::uint8_t> forbidden(3, 5);
  const std::vector<std::int32_t> few = {0, 1}, high = {0, 4, 0}, low = {0, -2, 0};
  CHECK_THROWS_WITH(check_overrides(Overrides<float>{.logit_bias = bias}, 3, 4),
                    "overrides.logit_bias: expected [3, 4], got [2, 4]");
  CHECK_THROWS_WITH(check_overrides(Overrides<float>{.forbidden = forbidden}, 3, 4),
                    "overrides.forbidden: expected [3, 4], got [3, 5]");
  CHECK_THROWS_WITH(check_overrides(Overrides<float>{.gates = one}, 3, 4),
                    "overrides.gates: expected [3, 4], got [1, 4]");
  CHECK_THROWS_WITH(check_overrides(Overrides<float>{.forced = few}, 3, 4),
                    "overrides.forced: expected 3 experts, got 2");
  CHECK_THROWS_WITH(check_overrides(Overrides<float>{.forced = high}, 3, 4),
                    "overrides.forced: expert 4 is not in -1 ... 3");
  CHECK_THROWS_WITH(check_overrides(Overrides<float>{.forced = low}, 3, 4),
                    "overrides.forced: expert -2 is not in -1 ... 3");
}

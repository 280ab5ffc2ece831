// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/excess_balance.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"
#include "support/slots.hpp"

namespace {

using mole::Index;
using test::Matrix;

template <class T>
T loss(T weight, const test::OwnedRouting<T>& routing, mole::MatView<T> dgate = {},
       const mole::TokenMask& mask = {}) {
  mole::Buffer memory(1024);
  mole::Workspace scratch(memory.span());
  return mole::excess_balance_loss<T>(weight, *routing, dgate, mole::Context{scratch}, mask);
}

}  // namespace

TEST_CASE("the excess balance loss weighs gates by how far their expert is above its share",
          "[losses]") {
  // Experts 0, 1, 2 have 3, 1, 0 tokens, the mean is 4/3; the probe counts for nothing.
  const test::OwnedRouting<double> routing(
      {{{0, 0.5}}, {{0, 0.75}, {2, 0.0}}, {{1, 0.25}}, {{0, 1.0}}}, 3);
  Matrix<double> dgate(1, 6, [](Index, Index) { return 8; });
  const double above = 3 / (4.0 / 3) - 1, below = 1 / (4.0 / 3) - 1;
  CHECK(loss<double>(2, routing, dgate) ==
        Catch::Approx(2 * (above * (0.5 + 0.75 + 1) + below * 0.25)));
  const double want[] = {8 + 2 * above, 8 + 2 * above, 8, 8 + 2 * below, 8 + 2 * above, 8};
  for (Index s = 0; s < 6; ++s) CHECK(dgate(0, s) == Catch::Approx(want[s]));
  CHECK(dgate.padding_is_intact());
  CHECK(loss<float>(2, {{{{0, 0.5}}, {{0, 0.75}}, {{1, 0.25}}, {{0, 1.0}}}, 3}) ==
        Catch::Approx(loss<double>(2, routing)).epsilon(1e-6));
}

TEST_CASE("the excess balance loss leaves masked tokens out", "[losses]") {
  const test::OwnedRouting<double> routing({{{0, 0.5}}, {{1, 0.75}}, {{0, 1.0}}}, 2);
  const std::vector<std::uint8_t> mask = {1, 1, 0}, none(3, 0);
  Matrix<double> dgate(1, 3);
  CHECK(loss<double>(1, routing, dgate, {mask}) == 0);
  CHECK(loss<double>(1, routing, dgate, {none}) == 0);
  CHECK(test::bit_difference(dgate, Matrix<double>(1, 3)) == "");
  CHECK(loss<double>(1, routing, dgate) == Catch::Approx(1.5 / 3 - 0.75 / 3));
}

TEST_CASE("the excess balance loss refuses other shapes", "[losses]") {
  const test::OwnedRouting<double> routing({{{0, 0.5}}, {{1, 0.75}}}, 2);
  Matrix<double> narrow(1, 1), tall(2, 2);
  const std::vector<std::uint8_t> mask = {1};
  CHECK_THROWS_AS(loss<double>(1, routing, narrow), mole::Error);
  CHECK_THROWS_AS(loss<double>(1, routing, tall), mole::Error);
  CHECK_THROWS_AS(loss<double>(1, routing, {}, {mask}), mole::Error);
  CHECK(loss<double>(1, {{}, 2}) == 0);
}

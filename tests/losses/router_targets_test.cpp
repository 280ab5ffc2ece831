// SPDX-License-Identifier: Apache-2.0
// Who was right, and which keys are pulled.
#include <vector>

#include "mole/losses/pull.hpp"
#include "mole/losses/supervised.hpp"
#include "support/catch.hpp"
#include "support/matrix.hpp"
#include "support/slots.hpp"

namespace {

using mole::Index;
using test::Matrix;

std::vector<std::uint8_t> marks(const Matrix<double>& probability, Index label) {
  std::vector<std::uint8_t> correct(static_cast<std::size_t>(probability.rows()), 7);
  mole::mark_correct<double>(probability.view(), label, correct);
  return correct;
}

}  // namespace

TEST_CASE("Experts whose most likely class is the label are right, or else the nearest one",
          "[losses]") {
  const Matrix<double> p(3, 3, [](Index e, Index c) {
    const double rows[3][3] = {{0.5, 0.3, 0.2}, {0.4, 0.4, 0.2}, {0.1, 0.6, 0.3}};
    return rows[e][c];
  });
  CHECK(marks(p, 0) == std::vector<std::uint8_t>{1, 1, 0});
  CHECK(marks(p, 1) == std::vector<std::uint8_t>{0, 0, 1});
  CHECK(marks(p, 2) == std::vector<std::uint8_t>{0, 0, 1});
  CHECK_THROWS_AS(marks(p, 3), mole::Error);
  CHECK_THROWS_AS(marks(p, -1), mole::Error);
  std::vector<std::uint8_t> few(2);
  CHECK_THROWS_AS(mole::mark_correct<double>(p.view(), 0, few), mole::Error);
}

TEST_CASE("The pull loss counts the keys that were selected, and adds its gradient", "[losses]") {
  const test::OwnedRouting<double> routing({{{0, 1.0}, {2, 1.0}}, {{1, 1.0}}}, 3);
  const Matrix<double> logits(2, 3, [](Index t, Index e) { return 0.25 * (t + e); });
  Matrix<double> dlogits(2, 3, [](Index, Index) { return 8; });
  const double loss = mole::pull_loss<double>(3, *routing, logits.view(), dlogits.view());
  CHECK(loss == Catch::Approx(3 * ((1 - 0.0) + (1 - 0.5) + (1 - 0.5)) / 2));
  for (Index t = 0; t < 2; ++t) {
    for (Index e = 0; e < 3; ++e) {
      const bool selected = t == 0 ? e != 1 : e == 1;
      CHECK(dlogits(t, e) == (selected ? 8 - 1.5 : 8));
    }
  }
  CHECK(dlogits.padding_is_intact());
  CHECK_THROWS_AS(mole::pull_loss<double>(1, *routing, logits.view().col_block(0, 2), {}),
                  mole::Error);
}

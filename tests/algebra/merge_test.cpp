// SPDX-License-Identifier: Apache-2.0
#include "mole/algebra/merge.hpp"

#include <cmath>
#include <limits>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"

namespace {

using mole::Index;
using mole::MatView;
using test::Matrix;
using test::random_matrix;

constexpr Index kIn = 7, kRank = 3;

/// W + s B A in plain loops, W stored [out, in] or, `turned`, [in, out]. `absolute`: the same sum
/// over absolute values, against which rounding is measured.
Matrix<double> merged(const Matrix<double>& down, const Matrix<double>& up, double scale,
                      const Matrix<double>& weight, bool turned, bool absolute) {
  const auto size = [&](double value) { return absolute ? std::fabs(value) : value; };
  return Matrix<double>(weight.rows(), weight.cols(), [&](Index row, Index col) {
    double sum = size(weight(row, col));
    for (Index r = 0; r < down.rows(); ++r) {
      sum += size(scale * up(turned ? col : row, r) * down(r, turned ? row : col));
    }
    return sum;
  });
}

template <class T, class W>
void check_merge(bool turned, Index out) {
  constexpr T kScale = T(-1.3);
  const auto down = random_matrix(kRank, kIn, 1), up = random_matrix(out, kRank, 2);
  const auto before = random_matrix(turned ? kIn : out, turned ? out : kIn, 3);
  Matrix<T> weight = test::converted<T>(before);
  auto stored_down = test::converted<W>(test::converted<float>(down));
  auto stored_up = test::converted<W>(test::converted<float>(up));
  mole::merge_lora(stored_down.view(), stored_up.view(), kScale, weight.view(), turned);
  CHECK(test::difference(weight, merged(down, up, kScale, before, turned, false),
                         merged(down, up, kScale, before, turned, true),
                         (kRank + 2) * std::numeric_limits<T>::epsilon()) == "");
  CHECK(weight.padding_is_intact());
}

}  // namespace

TEST_CASE("merge_lora adds s B A to a weight of either orientation and any storage", "[algebra]") {
  for (const bool turned : {false, true}) {
    for (const Index out : {5, 7}) {  // 7: a square, where no shape gives a swap away
      INFO("fan_in_fan_out " << turned << ", " << out << " outputs");
      check_merge<double, double>(turned, out);
      check_merge<float, float>(turned, out);
      check_merge<float, mole::bf16>(turned, out);
      check_merge<double, mole::f16>(turned, out);
    }
  }
}

TEST_CASE("merging with the opposite scale takes the adapter out again", "[algebra]") {
  auto down = random_matrix(kRank, kIn, 1), up = random_matrix(5, kRank, 2);
  const auto before = random_matrix(5, kIn, 3);
  auto weight = before;
  mole::merge_lora(down.view(), up.view(), 2.5, weight.view());
  CHECK(test::bit_difference(weight, before) != "");
  mole::merge_lora(down.view(), up.view(), -2.5, weight.view());
  CHECK(test::difference(weight, before, test::Close{0, 1e-14}) == "");
}

TEST_CASE("an adapter of rank 0 merges into nothing", "[algebra]") {
  const auto before = random_matrix(5, kIn, 3);
  auto weight = before;
  mole::merge_lora(MatView<double>(nullptr, 0, kIn), MatView<double>(nullptr, 5, 0), 2.0,
                   weight.view());
  CHECK(test::bit_difference(weight, before) == "");
}

TEST_CASE("merge_lora refuses wrong shapes and leaves the weight alone", "[algebra]") {
  auto down = random_matrix(kRank, kIn, 1), up = random_matrix(5, kRank, 2);
  auto narrow = random_matrix(5, kRank - 1, 2);
  const auto before = random_matrix(5, kIn, 3);
  auto weight = before;
  CHECK_THROWS_WITH(mole::merge_lora(down.view(), narrow.view(), 1.0, weight.view()),
                    "up: expected [5, 3], got [5, 2]");
  CHECK_THROWS_WITH(mole::merge_lora(down.view(), up.view(), 1.0, weight.view(), true),
                    "weight: expected [7, 5], got [5, 7]");
  CHECK(test::bit_difference(weight, before) == "");
}

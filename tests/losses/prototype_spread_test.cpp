// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/prototype_spread.hpp"

#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/gradcheck.hpp"
#include "support/matrix.hpp"

namespace {

using mole::DiversityLoss;
using mole::Index;
using test::Matrix;

constexpr Index kExperts = 5, kWidth = 7;
using Mask = std::vector<std::uint8_t>;

template <class T>
struct Spread {
  mole::Buffer memory{4096};
  mole::Workspace scratch{memory.span()};
  mole::Context context{scratch};

  T diversity(const DiversityLoss& loss, const Matrix<T>& p, mole::MatView<T> dp = {},
              const Mask& mask = {}) {
    return mole::diversity_loss<T>(loss, p.view(), dp, context, {mask});
  }
  T simplicity(T weight, const Matrix<T>& p, mole::MatView<T> dp = {}, const Mask& mask = {}) {
    return mole::simplicity_loss<T>(weight, p.view(), dp, context, {mask});
  }
};

double norm(const Matrix<double>& p, Index e) {
  double sum = 0;
  for (Index c = 0; c < p.cols(); ++c) sum += p(e, c) * p(e, c);
  return std::sqrt(sum);
}

double plain_diversity(const Matrix<double>& p, bool of_directions, const Mask& mask) {
  double sum = 0;
  for (Index i = 0; i < p.rows(); ++i) {
    for (Index j = 0; j < p.rows(); ++j) {
      if (mask[i] == 0 || mask[j] == 0) continue;
      double dot = 0;
      for (Index c = 0; c < p.cols(); ++c) dot += p(i, c) * p(j, c);
      if (of_directions) dot /= norm(p, i) * norm(p, j);
      sum += std::pow(dot - (i == j ? 1 : 0), 2);
    }
  }
  return std::sqrt(sum);
}

double plain_simplicity(const Matrix<double>& p, const Mask& mask) {
  double sum = 0, count = 0;
  for (Index e = 0; e < p.rows(); ++e) {
    if (mask[e] == 0) continue;
    sum += norm(p, e);
    ++count;
  }
  return sum / count;
}

const Mask kMasks[] = {{1, 1, 1, 1, 1}, {1, 0, 1, 1, 0}};

}  // namespace

TEST_CASE("the losses on prototypes are what plain loops give", "[losses]") {
  const auto p = test::random_matrix(kExperts, kWidth, 3);
  Spread<double> use;
  for (const Mask& mask : kMasks) {
    for (const bool of_directions : {true, false}) {
      const double want = plain_diversity(p, of_directions, mask);
      CHECK(want > 0.1);
      CHECK(use.diversity({.weight = 0.5, .of_directions = of_directions}, p, {}, mask) ==
            Catch::Approx(0.5 * want).epsilon(1e-13));
    }
    CHECK(use.simplicity(0.5, p, {}, mask) ==
          Catch::Approx(0.5 * plain_simplicity(p, mask)).epsilon(1e-13));
  }
  CHECK(use.diversity({}, p) == use.diversity({}, p, {}, kMasks[0]));
  CHECK(use.simplicity(1, p) == use.simplicity(1, p, {}, kMasks[0]));
  CHECK(use.scratch.free_bytes() == mole::Workspace(use.memory.span()).free_bytes());
}

TEST_CASE("the losses on prototypes add their gradients, to experts that take part", "[losses]") {
  auto p = test::random_matrix(kExperts, kWidth, 3);
  Spread<double> use;
  const auto check = [&](const Mask& mask, auto loss) {
    Matrix<double> dp(kExperts, kWidth, [](Index, Index) { return 8; });
    loss(dp.view());
    CHECK(dp.padding_is_intact());
    for (Index e = 0; e < kExperts; ++e) {
      for (Index c = 0; c < kWidth; ++c) {
        if (mask[e] == 0) CHECK(dp(e, c) == 8);
        dp(e, c) -= 8;
      }
    }
    const auto value = [&] { return loss(mole::MatView<double>()); };
    CHECK(test::gradient_error(p.view(), dp.view(), value, {1e-7, 1e-8}) == "");
  };
  for (const Mask& mask : kMasks) {
    for (const bool of_directions : {true, false}) {
      check(mask, [&](mole::MatView<double> dp) {
        return use.diversity({.weight = 0.5, .of_directions = of_directions}, p, dp, mask);
      });
    }
    check(mask, [&](mole::MatView<double> dp) { return use.simplicity(0.5, p, dp, mask); });
  }
}

TEST_CASE("a prototype of zeros has no direction and no gradient", "[losses]") {
  auto p = test::random_matrix(3, kWidth, 3);
  const Mask others = {1, 0, 1};
  for (Index c = 0; c < kWidth; ++c) p(1, c) = 0;
  Spread<double> use;
  for (const bool of_directions : {true, false}) {
    const DiversityLoss loss{.of_directions = of_directions};
    Matrix<double> dp(3, kWidth);
    const double without = use.diversity(loss, p, {}, others);
    CHECK(use.diversity(loss, p, dp) == Catch::Approx(std::sqrt(without * without + 1)));
    for (Index c = 0; c < kWidth; ++c) {
      CHECK(dp(1, c) == 0);
      CHECK(std::isfinite(dp(0, c)));
    }
  }
  Matrix<double> dp(3, kWidth);
  CHECK(use.simplicity(1, p, dp) == Catch::Approx((norm(p, 0) + norm(p, 2)) / 3));
  for (Index c = 0; c < kWidth; ++c) {
    CHECK(dp(1, c) == 0);
    CHECK(dp(2, c) == Catch::Approx(p(2, c) / norm(p, 2) / 3));
  }
  const Matrix<double> zeros(2, kWidth);
  Matrix<double> dzeros(2, kWidth);
  CHECK(use.diversity({}, zeros, dzeros) == std::sqrt(2.0));
  CHECK(use.simplicity(1, zeros, dzeros) == 0);
  CHECK(test::bit_difference(dzeros, zeros) == "");
}

TEST_CASE("directions at right angles cost nothing, whatever their lengths", "[losses]") {
  const Matrix<double> p(3, 4, [](Index e, Index c) { return c == e + 1 ? 4.0 * (e + 1) : 0.0; });
  Matrix<double> dp(3, 4);
  Spread<double> use;
  CHECK(use.diversity({}, p, dp) == 0);
  CHECK(test::bit_difference(dp, Matrix<double>(3, 4)) == "");
  CHECK(use.diversity({.of_directions = false}, p) ==
        Catch::Approx(std::sqrt(15.0 * 15 + 63 * 63 + 143 * 143)));
  CHECK(use.simplicity(1, p) == Catch::Approx(8));
  const Matrix<double> alike(3, 4, [](Index e, Index) { return e + 1.0; });
  CHECK(use.diversity({}, alike) == Catch::Approx(std::sqrt(6.0)));
}

TEST_CASE("the losses on prototypes in float agree with double", "[losses]") {
  const auto p = test::random_matrix(kExperts, kWidth, 3);
  Spread<float> single;
  Spread<double> twice;
  const auto narrow = test::converted<float>(p);
  CHECK(single.diversity({}, narrow) == Catch::Approx(twice.diversity({}, p)).epsilon(1e-6));
  CHECK(single.simplicity(1, narrow) == Catch::Approx(twice.simplicity(1, p)).epsilon(1e-6));
}

TEST_CASE("without an expert that takes part the losses on prototypes are 0", "[losses]") {
  Spread<double> use;
  CHECK(use.diversity({}, Matrix<double>(0, 4)) == 0);
  CHECK(use.simplicity(1, Matrix<double>(0, 4)) == 0);
  const auto p = test::random_matrix(2, kWidth, 3);
  CHECK(use.diversity({}, p, {}, {0, 0}) == 0);
  CHECK(use.simplicity(1, p, {}, {0, 0}) == 0);
}

TEST_CASE("the losses on prototypes refuse other shapes", "[losses]") {
  const auto p = test::random_matrix(3, kWidth, 3);
  Matrix<double> narrow(3, kWidth - 1);
  Spread<double> use;
  CHECK_THROWS_AS(use.diversity({}, p, narrow), mole::Error);
  CHECK_THROWS_AS(use.simplicity(1, p, narrow), mole::Error);
  CHECK_THROWS_AS(use.diversity({}, p, {}, {1, 1}), mole::Error);
  CHECK_THROWS_AS(use.simplicity(1, p, {}, {1, 1}), mole::Error);
}

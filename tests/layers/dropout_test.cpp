// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>

#include "layers/layer_case.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using mole::Index;
using mole::MatView;
using mole::Random;
using test::LayerCase;
using test::Matrix;

namespace {

template <class T>
Matrix<T> factor(double p, const Random& random, Index rows, Index cols) {
  Matrix<T> made(rows, cols);
  mole::fill_dropout(p, random, made.view());
  return made;
}

}  // namespace

TEMPLATE_TEST_CASE("dropout drops at its rate and keeps the mean", "[layers]", float, double) {
  constexpr Index kRows = 211, kCols = 97;
  constexpr double kCount = kRows * kCols;
  for (const double p : {0.0, 0.05, 0.3, 0.9}) {
    INFO("p = " << p);
    const auto made = factor<TestType>(p, Random(3), kRows, kCols);
    const auto keep = static_cast<TestType>(1 / (1 - p));
    double dropped = 0, odd = 0;
    for (Index i = 0; i < kRows * kCols; ++i) {
      const TestType value = made(i / kCols, i % kCols);
      dropped += value == TestType(0);
      odd += value != TestType(0) && value != keep;
    }
    CHECK(odd == 0);
    CHECK(std::fabs(dropped - p * kCount) <= 5 * std::sqrt(p * (1 - p) * kCount));
    CHECK(made.padding_is_intact());
  }
}

TEST_CASE("dropout is a function of seed, stream and position", "[layers]") {
  const auto first = factor<double>(0.5, Random(3, 1), 13, 17);
  CHECK(test::bit_difference(factor<double>(0.5, Random(3, 1), 13, 17), first) == "");
  CHECK(test::bit_difference(factor<double>(0.5, Random(4, 1), 13, 17), first) != "");
  CHECK(test::bit_difference(factor<double>(0.5, Random(3, 2), 13, 17), first) != "");
  CHECK(test::bit_difference(factor<double>(0.5, Random(3, 1), 5, 17),
                             first.view().row_block(0, 5)) == "");
  const auto raised = factor<double>(0.6, Random(3, 1), 13, 17);
  for (Index i = 0; i < 13 * 17; ++i) {  // the same numbers: more is dropped, nothing comes back
    CHECK((first(i / 17, i % 17) != 0 || raised(i / 17, i % 17) == 0));
  }
}

TEST_CASE("dropout of everything, of less than nothing and of NaN is refused", "[layers]") {
  Matrix<float> factor(2, 3, [](Index, Index) { return 7; });
  const Matrix<float> before = factor;
  for (const double p : {1.0, 1.5, -0.1, std::numeric_limits<double>::quiet_NaN()}) {
    CHECK_THROWS_AS(mole::fill_dropout(p, Random(1), factor.view()), mole::Error);
  }
  CHECK_THROWS_WITH(mole::fill_dropout(1.0, Random(1), factor.view()),
                    "dropout: p must be in [0, 1), got 1");
  CHECK(test::bit_difference(factor, before) == "");
}

TEST_CASE("dropout acts on what the experts read, not on base and router", "[layers]") {
  constexpr Index kTokens = 9, kIn = 23, kOut = 11;
  const mole::TopKRouter<double> router({.width = kIn, .experts = 3});
  LayerCase c(
      mole::AdaptedLinear{test::TopKMixture<double>{router, test::make_bank<double>(kIn, kOut, 3)}},
      kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto dropped = factor<double>(0.4, Random(2), kTokens, kIn);
  const Matrix<double> y0(kTokens, kOut);
  mole::LayerInput<double> input(x);
  input.dropout = dropped;
  const Matrix<double> y = c.infer(input, y0);
  CHECK(test::bit_difference(c.record(input, y0), y) == "");

  // By hand: base on x, then the experts alone on x ∘ dropout with the router still on x.
  const Matrix<double> product(kTokens, kIn,
                               [&](Index t, Index i) { return x(t, i) * dropped(t, i); });
  mole::LayerInput<double> by_hand(product);
  by_hand.router_x = x;
  const Matrix<double> base = [&] {
    const std::uint8_t none[] = {1, 1, 1};
    mole::LayerInput<double> idle(x);
    idle.overrides.forbidden = {none, 1, 3};
    return c.infer(idle, y0);
  }();
  Matrix<double> expected = base;
  c.layer.mixture().forward(c.prepared.mixture, by_hand, expected, nullptr, c.context);
  CHECK(test::bit_difference(y, expected) == "");
  CHECK(test::bit_difference(c.infer(x, y0), y) != "");

  Matrix<double> ones(kTokens, kIn, [](Index, Index) { return 1; });
  input.dropout = ones;
  CHECK(test::bit_difference(c.infer(input, y0), c.infer(x, y0)) == "");
}

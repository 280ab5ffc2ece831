// SPDX-License-Identifier: Apache-2.0
#include "mole/algebra/router_fit.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "support/alloc_counter.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"

namespace {

using mole::Index;
using test::Matrix;

/// W of least_squares for X, Y.
Matrix<double> solve(const Matrix<double>& x, const Matrix<double>& y) {
  Matrix<double> columns(x.cols(), x.rows(), [&](Index i, Index t) { return x(t, i); });
  Matrix<double> w(x.cols(), y.cols());
  mole::Buffer block(std::size_t{1} << 16);
  mole::Workspace scratch(block.span());
  mole::least_squares(columns, y.view(), w, mole::Context{scratch});
  CHECK(w.padding_is_intact());
  return w;
}

/// The largest element of Xᵀ (X W - Y).
double normal_residual(const Matrix<double>& x, const Matrix<double>& y, const Matrix<double>& w) {
  double worst = 0;
  for (Index o = 0; o < y.cols(); ++o) {
    for (Index i = 0; i < x.cols(); ++i) {
      double sum = 0;
      for (Index t = 0; t < x.rows(); ++t) {
        double error = -y(t, o);
        for (Index j = 0; j < x.cols(); ++j) error += x(t, j) * w(j, o);
        sum += x(t, i) * error;
      }
      worst = std::max(worst, std::abs(sum));
    }
  }
  return worst;
}

/// Three groups of contexts; every group is served best by another expert.
struct Example {
  Matrix<double> contexts{12, 2, [](Index t, Index i) {
                            const double centre[3][2] = {{0, 0}, {4, 1}, {-3, 5}};
                            return centre[t % 3][i] + 0.1 * static_cast<double>((7 * t + i) % 5);
                          }};
  Matrix<double> losses{12, 3, [](Index t, Index e) { return e == (t + 1) % 3 ? 0.1 : 1.0 + e; }};
  Matrix<double> centres{3, 2, [](Index e, Index i) {
                           return e == 0 ? 0 : e == 1 ? 3 : 3 * i - 2;
                         }};
  Matrix<double> weight{3, 2}, bias{1, 3}, loss{3, 3}, target{12, 3};
  std::vector<std::int32_t> cluster = std::vector<std::int32_t>(12),
                            expert = std::vector<std::int32_t>(3);
  mole::Buffer block{std::size_t{1} << 16};
  mole::Workspace scratch{block.span()};

  mole::RouterFitResult fit(const mole::RouterFit& how = {}) {
    return mole::fit_router<double>(how, {contexts.view(), losses.view(), {}}, centres,
                                    {weight.view(), bias.view()}, {cluster, expert, loss, target},
                                    mole::Context{scratch});
  }
};

}  // namespace

TEST_CASE("Least squares leave a residual that is orthogonal to the columns", "[algebra]") {
  const auto x = test::random_matrix(9, 4, 1), y = test::random_matrix(9, 2, 2);
  CHECK(normal_residual(x, y, solve(x, y)) < 1e-13);
}

TEST_CASE("Of many least squares the shortest is taken", "[algebra]") {
  const auto y = test::random_matrix(9, 2, 2);
  Matrix<double> x = test::random_matrix(9, 4, 1);
  for (Index t = 0; t < 9; ++t) x(t, 3) = x(t, 1);  // equal columns share the weight
  const auto w = solve(x, y);
  CHECK(normal_residual(x, y, w) < 1e-13);
  for (Index o = 0; o < 2; ++o) CHECK(w(1, o) == Catch::Approx(w(3, o)));
  const auto few = test::random_matrix(2, 5, 3), wanted = test::random_matrix(2, 1, 4);
  const auto exact = solve(few, wanted);
  for (Index t = 0; t < 2; ++t) {
    double sum = 0;
    for (Index i = 0; i < 5; ++i) sum += few(t, i) * exact(i, 0);
    CHECK(sum == Catch::Approx(wanted(t, 0)));
  }
  Matrix<double> nothing(3, 2);
  CHECK(solve(nothing, test::random_matrix(3, 1, 1))(0, 0) == 0);
}

TEST_CASE("A fitted router sends every context to the expert that serves it", "[algebra]") {
  Example example;
  const auto result = example.fit();
  CHECK(result.updated);
  CHECK(result.iterations < 20);
  for (Index t = 0; t < 12; ++t) {
    std::vector<double> logit(3);
    for (Index e = 0; e < 3; ++e) {
      logit[e] = example.bias(0, e);
      for (Index i = 0; i < 2; ++i) logit[e] += example.weight(e, i) * example.contexts(t, i);
    }
    CHECK(std::max_element(logit.begin(), logit.end()) - logit.begin() == (t + 1) % 3);
    CHECK(example.target(t, (t + 1) % 3) == 1);
  }
  CHECK(std::set<std::int32_t>(example.expert.begin(), example.expert.end()).size() == 3);
}

TEST_CASE("A fit allocates nothing and gives its scratch back", "[algebra]") {
  Example example;
  const long before = test::allocations();
  const std::size_t room = example.scratch.free_bytes();
  example.fit();
  if (test::kCountsAllocations) CHECK(test::allocations() == before);
  CHECK(example.scratch.free_bytes() == room);
}

TEST_CASE("A fit says how much scratch it needs, and writes nothing without it", "[algebra]") {
  const std::size_t bytes = mole::fit_router_bytes(12, 2, 3);
  Example enough;
  enough.block = mole::Buffer(bytes);
  enough.scratch = mole::Workspace(enough.block.span());
  CHECK(enough.fit().updated);
  Example small;
  small.scratch = mole::Workspace(small.block.span().first(bytes - 2 * mole::kAlignment));
  const Example before;
  small.cluster.assign(12, 7);
  try {
    small.fit();
    FAIL_CHECK("accepted");
  } catch (const mole::Error& error) {
    CHECK(error.code() == mole::Errc::out_of_memory);
  }
  CHECK(test::bit_difference(small.centres, before.centres) == "");
  CHECK(test::bit_difference(small.weight, before.weight) == "");
  CHECK(test::bit_difference(small.loss, before.loss) == "");
  CHECK(small.cluster == std::vector<std::int32_t>(12, 7));
}

TEST_CASE("An expert whose losses diverged gets what the others leave", "[algebra]") {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  for (const double diverged : {kInfinity, kNaN}) {
    CAPTURE(diverged);
    Example example;
    for (Index t = 0; t < 12; ++t) example.losses(t, 0) = diverged;
    example.losses(0, 1) = diverged;  // once is not the median
    CHECK(example.fit().updated);
    CHECK(example.expert == std::vector<std::int32_t>{1, 2, 0});
    CHECK(example.loss(0, 0) == kInfinity);
    CHECK(example.loss(0, 1) == Catch::Approx(0.1));
  }
}

TEST_CASE("Without convergence or with an empty cluster the router stays", "[algebra]") {
  Example late;
  CHECK_FALSE(late.fit({.max_iterations = 1}).updated);
  CHECK(late.weight(1, 1) == 0);
  CHECK(late.centres(1, 0) == 0);
  CHECK(late.cluster[0] == -1);
  Example empty;
  empty.centres(2, 0) = 1e6;
  CHECK_FALSE(empty.fit().updated);
  CHECK(empty.expert[0] == -1);
}

TEST_CASE("A fit refuses what does not fit", "[algebra]") {
  Example example;
  example.losses = Matrix<double>(12, 2);
  CHECK_THROWS_AS(example.fit(), mole::Error);
  Example other;
  other.cluster.pop_back();
  CHECK_THROWS_AS(other.fit(), mole::Error);
  Example wide;
  wide.centres = Matrix<double>(3, 3);
  CHECK_THROWS_AS(wide.fit(), mole::Error);
  Example none;
  none.centres = none.weight = Matrix<double>(0, 2);
  none.losses = none.target = Matrix<double>(12, 0);
  none.bias = Matrix<double>(1, 0);
  none.loss = Matrix<double>(0, 0);
  none.expert.clear();
  try {
    none.fit();
    FAIL_CHECK("accepted");
  } catch (const mole::Error& error) {
    INFO(error.what());
    CHECK(error.code() == mole::Errc::invalid_argument);
  }
}

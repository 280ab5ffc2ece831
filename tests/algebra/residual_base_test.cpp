// SPDX-License-Identifier: Apache-2.0
#include "mole/algebra/residual_base.hpp"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "mole/core/error.hpp"
#include "support/catch.hpp"

namespace {

using mole::Index;
using mole::MatView;

/// A matrix of its own, in rows longer than the matrix is wide.
template <class T>
struct Matrix {
  std::vector<T> memory;
  MatView<T> view;

  Matrix(Index rows, Index cols)
      : memory(static_cast<std::size_t>(rows * (cols + 3)), T(0)),
        view(memory.data(), rows, cols, cols + 3) {}
  Matrix(const Matrix& other) : memory(other.memory), view(other.view) {
    view.data = memory.data();
  }
};

template <class T>
Matrix<T> random_matrix(Index rows, Index cols, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<double> number(-1, 1);
  Matrix<T> made(rows, cols);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) made.view(i, j) = static_cast<T>(number(engine));
  }
  return made;
}

Matrix<double> product(const Matrix<double>& a, const Matrix<double>& b) {
  Matrix<double> made(a.view.rows, b.view.cols);
  for (Index i = 0; i < a.view.rows; ++i) {
    for (Index j = 0; j < b.view.cols; ++j) {
      for (Index k = 0; k < a.view.cols; ++k) made.view(i, j) += a.view(i, k) * b.view(k, j);
    }
  }
  return made;
}

double largest(MatView<const double> m) {
  double found = 0;
  for (Index i = 0; i < m.rows; ++i) {
    for (Index j = 0; j < m.cols; ++j) found = std::max(found, std::fabs(m(i, j)));
  }
  return found;
}

/// Sum of squares.
double energy(MatView<const double> m) {
  double sum = 0;
  for (Index i = 0; i < m.rows; ++i) {
    for (Index j = 0; j < m.cols; ++j) sum += m(i, j) * m(i, j);
  }
  return sum;
}

}  // namespace

TEST_CASE("residual base: a weight of the adapter's rank leaves nothing", "[algebra]") {
  const Matrix<double> weight =
      product(random_matrix<double>(11, 3, 1), random_matrix<double>(3, 7, 2));
  Matrix<double> rest(11, 7);
  mole::pissa_residual<double>(weight.view, 3, rest.view);
  CHECK(largest(rest.view) < 1e-13);
  mole::olora_residual<double>(weight.view, 3, 1.0, rest.view);
  CHECK(largest(rest.view) < 1e-13);
  mole::pissa_residual<double>(weight.view, 2, rest.view);
  CHECK(largest(rest.view) > 1e-3);
}

TEST_CASE("residual base: what is taken off weighs as much as its singular values", "[algebra]") {
  // Two orthogonal parts with singular values 3 and 2.
  Matrix<double> weight(2, 3);
  weight.view(0, 1) = 3;
  weight.view(1, 2) = -2;
  Matrix<double> rest(2, 3);
  mole::pissa_residual<double>(weight.view, 1, rest.view);
  CHECK(std::fabs(rest.view(0, 1)) < 1e-14);
  CHECK(rest.view(1, 2) == Catch::Approx(-2).epsilon(1e-14));
  // The part and the rest are orthogonal: energies add up.
  const Matrix<double> any = random_matrix<double>(9, 5, 3);
  Matrix<double> left(9, 5);
  mole::pissa_residual<double>(any.view, 2, left.view);
  double part = 0;
  for (Index i = 0; i < 9; ++i) {
    for (Index j = 0; j < 5; ++j) part += std::pow(any.view(i, j) - left.view(i, j), 2);
  }
  CHECK(part + energy(left.view) == Catch::Approx(energy(any.view)).epsilon(1e-12));
}

TEST_CASE("residual base: the first columns of OLoRA's weight lose scale times themselves",
          "[algebra]") {
  // Q R reproduces the first r columns exactly.
  const Matrix<double> weight = random_matrix<double>(7, 11, 4);
  Matrix<double> rest(7, 11);
  mole::olora_residual<double>(weight.view, 2, 0.25, rest.view);
  double worst = 0, later = 0;
  for (Index i = 0; i < 7; ++i) {
    for (Index j = 0; j < 11; ++j) {
      const double change = std::fabs(rest.view(i, j) - 0.75 * weight.view(i, j));
      (j < 2 ? worst : later) = std::max(j < 2 ? worst : later, change);
    }
  }
  CHECK(worst < 1e-14);
  CHECK(later > 1e-3);
}

TEST_CASE("residual base: in place, transposed and in float it is the same", "[algebra]") {
  const Matrix<float> weight = random_matrix<float>(13, 6, 5);
  Matrix<double> wide(13, 6), turned(6, 13);
  for (Index i = 0; i < 13; ++i) {
    for (Index j = 0; j < 6; ++j) wide.view(i, j) = turned.view(j, i) = weight.view(i, j);
  }
  Matrix<float> narrow(13, 6);
  mole::pissa_residual<float>(weight.view, 4, narrow.view);
  mole::pissa_residual<double>(wide.view, 4, wide.view);
  mole::pissa_residual<double>(turned.view, 4, turned.view);
  int different = 0;
  double apart = 0;
  for (Index i = 0; i < 13; ++i) {
    for (Index j = 0; j < 6; ++j) {
      different += narrow.view(i, j) == static_cast<float>(wide.view(i, j)) ? 0 : 1;
      apart = std::max(apart, std::fabs(wide.view(i, j) - turned.view(j, i)));
    }
  }
  CHECK(different == 0);
  CHECK(apart < 1e-14);
}

TEST_CASE("residual base: ranks, shapes and numbers are checked", "[algebra]") {
  Matrix<double> weight = random_matrix<double>(4, 3, 6);
  Matrix<double> rest(4, 3), other(3, 4);
  CHECK_THROWS_AS(mole::pissa_residual<double>(weight.view, 0, rest.view), mole::Error);
  CHECK_THROWS_AS(mole::pissa_residual<double>(weight.view, 4, rest.view), mole::Error);
  CHECK_THROWS_AS(mole::pissa_residual<double>(weight.view, 2, other.view), mole::Error);
  CHECK_THROWS_AS(mole::olora_residual<double>(weight.view, 4, 1, rest.view), mole::Error);
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_AS(mole::olora_residual<double>(weight.view, 2, kNaN, rest.view), mole::Error);
  weight.view(3, 2) = kNaN;
  CHECK_THROWS_AS(mole::pissa_residual<double>(weight.view, 2, rest.view), mole::Error);
  CHECK(largest(rest.view) == 0.0);
}

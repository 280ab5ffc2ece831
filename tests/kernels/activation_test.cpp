// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/activation.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"

namespace {

using mole::Activation;
using mole::Index;
using test::Matrix;

constexpr Activation kAll[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                               Activation::relu};

/// The textbook formulas, in the precision of long double.
double expected(Activation activation, double v) {
  const long double x = v;
  const long double u = std::sqrt(2 / std::acos(-1.0L)) * (x + 0.044715L * x * x * x);
  switch (activation) {
    case Activation::silu: return static_cast<double>(x / (1 + std::exp(-x)));
    case Activation::gelu: return static_cast<double>(x / 2 * std::erfc(-x / std::sqrt(2.0L)));
    case Activation::gelu_tanh: return static_cast<double>(x / 2 * (1 + std::tanh(u)));
    case Activation::relu: return v > 0 ? v : 0;
  }
  return 0;
}

std::vector<std::int32_t> rows_of(Index count) {
  std::vector<std::int32_t> rows;
  for (Index r = 0; r < count; ++r) rows.push_back(static_cast<std::int32_t>(r));
  return rows;
}

struct Scratch {
  mole::Workspace none;
  mole::Context context{none};
};

/// Numbers from -6 to 6, of either parity.
template <class T>
Matrix<T> arguments() {
  return Matrix<T>(5, 25, [](Index r, Index c) { return (r * 25 + c - 62) * 0.0971; });
}

}  // namespace

TEMPLATE_TEST_CASE("activations have the values of their formulas", "[kernels]", float, double) {
  using T = TestType;
  const double eps = std::numeric_limits<T>::epsilon();
  Scratch scratch;
  const Matrix<T> v = arguments<T>();
  Matrix<T> up(v.rows(), v.cols(), [](Index r, Index c) { return (c % 5 - 2) * 0.5 + r; });
  for (const Activation activation : kAll) {
    INFO(enum_names(activation)[static_cast<std::size_t>(activation)]);
    Matrix<T> plain(v.rows(), v.cols()), gated(v.rows(), v.cols());
    const auto rows = rows_of(v.rows());
    mole::gated::activate<T>(activation, rows, v.view(), {}, plain.view(), scratch.context);
    mole::gated::activate<T>(activation, rows, v.view(), up.view(), gated.view(), scratch.context);
    const Matrix<double> want(v.rows(), v.cols(),
                              [&](Index r, Index c) { return expected(activation, v(r, c)); });
    const Matrix<double> want_gated(
        v.rows(), v.cols(), [&](Index r, Index c) { return want(r, c) * double(up(r, c)); });
    // The slope of the exponent makes the error of the argument 6 times as large in the tail.
    CHECK(test::difference(plain, want, {64 * eps, 0.01 * eps}) == "");
    CHECK(test::difference(gated, want_gated, {64 * eps, 0.01 * eps}) == "");
  }
}

TEST_CASE("slopes of activations agree with difference quotients", "[kernels]") {
  Scratch scratch;
  const Matrix<double> v = arguments<double>();
  const auto rows = rows_of(v.rows());
  const Matrix<double> up(v.rows(), v.cols(), [](Index r, Index c) { return 0.3 * r - 0.2 * c; });
  const Matrix<double> d(v.rows(), v.cols(), [](Index r, Index c) { return 1 + 0.1 * c - r; });
  for (const Activation activation : kAll) {
    INFO(enum_names(activation)[static_cast<std::size_t>(activation)]);
    Matrix<double> d_gate(v.rows(), v.cols()), d_up(v.rows(), v.cols());
    Matrix<double> d_plain(v.rows(), v.cols());
    mole::gated::activate_backward<double>(activation, rows, v.view(), up.view(), d.view(),
                                           d_gate.view(), d_up.view(), scratch.context);
    mole::gated::activate_backward<double>(activation, rows, v.view(), {}, d.view(), d_plain.view(),
                                           {}, scratch.context);
    constexpr double kStep = 1e-5;
    const auto slope = [&](Index r, Index c) {
      const double x = v(r, c);
      return (expected(activation, x + kStep) - expected(activation, x - kStep)) / (2 * kStep);
    };
    // v has no element within a step of 0 but 0 itself, where relu has no slope to compare.
    const auto at = [&](Index r, Index c, double factor) {
      const bool corner = activation == Activation::relu && v(r, c) == 0;
      return corner ? 0 : d(r, c) * slope(r, c) * factor;
    };
    const Matrix<double> want(v.rows(), v.cols(),
                              [&](Index r, Index c) { return at(r, c, up(r, c)); });
    const Matrix<double> want_plain(v.rows(), v.cols(),
                                    [&](Index r, Index c) { return at(r, c, 1); });
    const Matrix<double> want_up(v.rows(), v.cols(), [&](Index r, Index c) {
      return d(r, c) * expected(activation, v(r, c));
    });
    CHECK(test::difference(d_gate, want, {1e-7, 1e-8}) == "");
    CHECK(test::difference(d_plain, want_plain, {1e-7, 1e-8}) == "");
    CHECK(test::difference(d_up, want_up, {1e-14, 1e-14}) == "");
  }
}

TEST_CASE("activations touch listed rows alone and stay finite at the ends", "[kernels]") {
  Scratch scratch;
  const std::int32_t listed[] = {1};
  constexpr float kEnds[] = {-1e30f, -200, 200, 1e30f};
  const Matrix<float> v(3, 4, [&](Index, Index c) { return kEnds[c]; });
  for (const Activation activation : kAll) {
    INFO(enum_names(activation)[static_cast<std::size_t>(activation)]);
    Matrix<float> y(3, 4, [](Index, Index) { return 7; }), d_gate = y;
    const Matrix<float> d(3, 4, [](Index, Index) { return 1; });
    mole::gated::activate<float>(activation, listed, v.view(), {}, y.view(), scratch.context);
    mole::gated::activate_backward<float>(activation, listed, v.view(), {}, d.view(), d_gate.view(),
                                          {}, scratch.context);
    const Matrix<float> want(
        3, 4, [&](Index r, Index c) { return r != 1 ? 7 : (kEnds[c] > 0 ? kEnds[c] : 0); });
    const Matrix<float> slope(3, 4, [&](Index r, Index c) { return r != 1 ? 7 : c / 2; });
    CHECK(test::difference(y, want, {1e-6, 1e-30}) == "");
    CHECK(test::difference(d_gate, slope, {1e-6, 1e-30}) == "");
  }
}

// SPDX-License-Identifier: Apache-2.0
// Comparisons that name the worst cell. They return a text, empty when all is well:
//
//   CHECK(difference(y, expected, Close{1e-6, 1e-7}) == "");
//   CHECK(bit_difference(y, y_again) == "");
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "mole/core/view.hpp"

namespace test {

using mole::Index;
using mole::MatView;

/// |got - want| <= abs + rel |want|
struct Close {
  double rel = 0, abs = 0;
};

namespace detail {

template <class T>
MatView<const T> view_of(MatView<T> view) {
  return view;
}
template <class T>
MatView<const T> view_of(MatView<const T> view) {
  return view;
}
template <class T>
MatView<const T> view_of(const std::vector<T>& values) {
  return {values.data(), 1, static_cast<Index>(values.size())};
}
template <class T>
MatView<const T> view_of(std::span<T> values) {
  return {values.data(), 1, static_cast<Index>(values.size())};
}
template <class M>
auto view_of(const M& matrix) -> decltype(matrix.view()) {
  return matrix.view();
}

template <class A, class B>
std::string shape_difference(const A& got, const B& want) {
  if (got.rows == want.rows && got.cols == want.cols) return "";
  std::ostringstream text;
  text << "shape [" << got.rows << ", " << got.cols << "], expected [" << want.rows << ", "
       << want.cols << "]";
  return text.str();
}

/// Error over tolerance; NaN must meet NaN, infinity the same infinity.
inline double excess(double got, double want, double tolerance) {
  if (got == want || (std::isnan(got) && std::isnan(want))) return 0;
  if (!std::isfinite(got) || !std::isfinite(want)) return std::numeric_limits<double>::infinity();
  return std::fabs(got - want) / tolerance;
}

/// tolerance(row, col) >= 0
template <class A, class B, class Tolerance>
std::string worst_cell(const A& got, const B& want, Tolerance&& tolerance) {
  if (const std::string text = shape_difference(got, want); !text.empty()) return text;
  double worst = 1;
  std::ostringstream text;
  for (Index r = 0; r < got.rows; ++r) {
    for (Index c = 0; c < got.cols; ++c) {
      const auto g = static_cast<double>(got(r, c)), w = static_cast<double>(want(r, c));
      const double e = excess(g, w, tolerance(r, c));
      if (!(e > worst)) continue;
      worst = e;
      text.str("");
      text.precision(std::numeric_limits<double>::max_digits10);
      text << "[" << r << ", " << c << "]: got " << g << ", expected " << w << ", " << e
           << " times the tolerance " << tolerance(r, c);
    }
  }
  return text.str();
}

}  // namespace detail

/// Where two matrices (views, test matrices, vectors) differ most, measured in tolerances.
template <class A, class B>
std::string difference(const A& got, const B& want, Close close) {
  const auto w = detail::view_of(want);
  return detail::worst_cell(detail::view_of(got), w, [&](Index r, Index c) {
    return close.abs + close.rel * std::fabs(static_cast<double>(w(r, c)));
  });
}

/// The same with a tolerance of `units` times the magnitude of every cell: for sums, `magnitude` is
/// the sum of the absolute values of the terms.
template <class A, class B, class C>
std::string difference(const A& got, const B& want, const C& magnitude, double units) {
  const auto m = detail::view_of(magnitude);
  return detail::worst_cell(detail::view_of(got), detail::view_of(want),
                            [&](Index r, Index c) { return units * static_cast<double>(m(r, c)); });
}

/// The first cell whose bits differ: -0 is not 0, and a NaN is only its own equal.
template <class A, class B>
std::string bit_difference(const A& got, const B& want) {
  const auto g = detail::view_of(got);
  const auto w = detail::view_of(want);
  if (std::string text = detail::shape_difference(g, w); !text.empty()) return text;
  using T = std::remove_cvref_t<decltype(g(0, 0))>;
  static_assert(std::is_same_v<T, std::remove_cvref_t<decltype(w(0, 0))>>);
  for (Index r = 0; r < g.rows; ++r) {
    for (Index c = 0; c < g.cols; ++c) {
      if (std::memcmp(&g(r, c), &w(r, c), sizeof(T)) == 0) continue;
      std::ostringstream text;
      text.precision(std::numeric_limits<double>::max_digits10);
      text << "[" << r << ", " << c << "]: got " << std::hexfloat << g(r, c) << ", expected "
           << w(r, c);
      return text.str();
    }
  }
  return "";
}

}  // namespace test

// SPDX-License-Identifier: Apache-2.0
// Linear least squares of minimum norm, for small problems.
//
//   W = argmin ‖X W - Y‖, the shortest one      X [rows, cols]   Y [rows, outputs]   W [cols,
//   outputs]
//
// By one-sided Jacobi rotations of the columns of X: X V = U S. Singular values up to
// epsilon · max(rows, cols) · the largest are left out. All in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"

namespace mole::inline MOLE_ABI {

namespace detail {

inline double dot(std::span<const double> a, std::span<const double> b) noexcept {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum = std::fma(a[i], b[i], sum);
  return sum;
}

/// (a, b) <- (c a - s b, s a + c b)
inline void rotate(std::span<double> a, std::span<double> b, double c, double s) noexcept {
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double first = a[i];
    a[i] = std::fma(c, first, -(s * b[i]));
    b[i] = std::fma(s, first, c * b[i]);
  }
}

/// Makes the rows of `columns` orthogonal by rotations, and applies them to the rows of `turns`.
inline void orthogonalise(MatView<double> columns, MatView<double> turns) noexcept {
  constexpr int kMostSweeps = 60;
  constexpr double kSmall = std::numeric_limits<double>::epsilon();
  bool moved = true;
  for (int sweep = 0; moved && sweep < kMostSweeps; ++sweep) {
    moved = false;
    for (Index p = 0; p < columns.rows; ++p) {
      for (Index q = p + 1; q < columns.rows; ++q) {
        const double pp = dot(columns.row(p), columns.row(p));
        const double qq = dot(columns.row(q), columns.row(q));
        const double pq = dot(columns.row(p), columns.row(q));
        if (pq == 0 || std::abs(pq) <= kSmall * std::sqrt(pp) * std::sqrt(qq)) continue;
        moved = true;
        const double zeta = (qq - pp) / (2 * pq);
        const double tangent =
            (zeta < 0 ? -1 : 1) / (std::abs(zeta) + std::sqrt(std::fma(zeta, zeta, 1.0)));
        const double cosine = 1 / std::sqrt(std::fma(tangent, tangent, 1.0));
        rotate(columns.row(p), columns.row(q), cosine, cosine * tangent);
        rotate(turns.row(p), turns.row(q), cosine, cosine * tangent);
      }
    }
  }
}

}  // namespace detail

/// x is read by columns, as rows of `columns` [cols, rows], and overwritten. Writes w. Throws
/// shape_mismatch.
inline void least_squares(MatView<double> columns, MatView<const double> y, MatView<double> w,
                          const Context& context) {
  const Index cols = columns.rows, rows = columns.cols, outputs = y.cols;
  require_shape("y", y, rows, outputs);
  require_shape("w", w, cols, outputs);
  const Workspace::Frame frame(context.scratch);
  const MatView<double> turns = context.scratch.take<double>(cols, cols);
  for (Index i = 0; i < cols; ++i) {
    for (Index j = 0; j < cols; ++j) turns(i, j) = i == j ? 1 : 0;
    std::ranges::fill(w.row(i), 0.0);
  }
  detail::orthogonalise(columns, turns);
  double largest = 0;
  for (Index j = 0; j < cols; ++j) {
    largest = std::max(largest, std::sqrt(detail::dot(columns.row(j), columns.row(j))));
  }
  const double cut =
      std::numeric_limits<double>::epsilon() * static_cast<double>(std::max(rows, cols)) * largest;
  for (Index j = 0; j < cols; ++j) {
    const double square = detail::dot(columns.row(j), columns.row(j));
    if (!(std::sqrt(square) > cut)) continue;
    for (Index o = 0; o < outputs; ++o) {
      double along = 0;
      for (Index r = 0; r < rows; ++r) along = std::fma(columns(j, r), y(r, o), along);
      for (Index i = 0; i < cols; ++i) w(i, o) = std::fma(turns(j, i), along / square, w(i, o));
    }
  }
}

}  // namespace mole::inline MOLE_ABI

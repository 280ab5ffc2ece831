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
#include "mole/kernels/gated_low_rank.hpp"

namespace mole::inline MOLE_ABI {

namespace detail {

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
        const double pp = gated::dot<double>(columns.row(p), columns.row(p));
        const double qq = gated::dot<double>(columns.row(q), columns.row(q));
        const double pq = gated::dot<double>(columns.row(p), columns.row(q));
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

/// As below; turns [cols, cols] is overwritten too.
inline void least_squares(MatView<double> columns, MatView<const double> y, MatView<double> w,
                          MatView<double> turns) noexcept {
  const Index cols = columns.rows, rows = columns.cols;
  for (Index i = 0; i < cols; ++i) {
    for (Index j = 0; j < cols; ++j) turns(i, j) = i == j ? 1 : 0;
    std::ranges::fill(w.row(i), 0.0);
  }
  orthogonalise(columns, turns);
  double largest = 0;
  for (Index j = 0; j < cols; ++j) {
    largest = std::max(largest, std::sqrt(gated::dot<double>(columns.row(j), columns.row(j))));
  }
  const double cut =
      std::numeric_limits<double>::epsilon() * static_cast<double>(std::max(rows, cols)) * largest;
  for (Index j = 0; j < cols; ++j) {
    const double square = gated::dot<double>(columns.row(j), columns.row(j));
    if (!(std::sqrt(square) > cut)) continue;
    for (Index o = 0; o < y.cols; ++o) {
      double along = 0;
      for (Index r = 0; r < rows; ++r) along = std::fma(columns(j, r), y(r, o), along);
      for (Index i = 0; i < cols; ++i) w(i, o) = std::fma(turns(j, i), along / square, w(i, o));
    }
  }
}

}  // namespace detail

/// x is read by columns, as rows of `columns` [cols, rows], and overwritten. Writes w. Takes
/// [cols, cols] numbers of scratch. Throws shape_mismatch, out_of_memory.
inline void least_squares(MatView<double> columns, MatView<const double> y, MatView<double> w,
                          const Context& context) {
  require_shape("y", y, columns.cols, y.cols);
  require_shape("w", w, columns.rows, y.cols);
  const Workspace::Frame frame(context.scratch);
  detail::least_squares(columns, y, w, context.scratch.take<double>(columns.rows, columns.rows));
}

}  // namespace mole::inline MOLE_ABI

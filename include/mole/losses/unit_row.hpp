// SPDX-License-Identifier: Apache-2.0
// Rows over their norms, in losses that compare directions: v / max(‖v‖, 1e-12).
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI::detail {

inline constexpr double kSmallestNorm = 1e-12;

inline double row_norm(std::span<const double> row) noexcept {
  double sum = 0;
  for (const double v : row) sum = std::fma(v, v, sum);
  return std::sqrt(sum);
}

/// Divides the row by its norm, which it returns, not below kSmallestNorm.
inline double normalise_row(std::span<double> row) noexcept {
  const double norm = std::max(row_norm(row), kSmallestNorm);
  for (double& v : row) v /= norm;
  return norm;
}

/// Makes of the gradient by a unit vector that by the row it was made of.
inline void normalise_row_backward(std::span<const double> unit, double norm,
                                   std::span<double> d) noexcept {
  double along = 0;
  for (std::size_t c = 0; c < d.size() && norm > kSmallestNorm; ++c) {
    along = std::fma(unit[c], d[c], along);
  }
  for (std::size_t c = 0; c < d.size(); ++c) d[c] = std::fma(-along, unit[c], d[c]) / norm;
}

/// sum += factor row.
inline void add_row(double factor, std::span<const double> row, std::span<double> sum) noexcept {
  for (std::size_t c = 0; c < row.size(); ++c) sum[c] = std::fma(factor, row[c], sum[c]);
}

}  // namespace mole::inline MOLE_ABI::detail

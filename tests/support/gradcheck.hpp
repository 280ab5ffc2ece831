// SPDX-License-Identifier: Apache-2.0
// Gradients against central differences, in double.
#pragma once

#include <cmath>
#include <string>

#include "mole/core/view.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"

namespace test {

/// d loss / d values by central differences. `loss()` reads `values`, which are put back.
template <class Loss>
Matrix<double> difference_quotients(MatView<double> values, Loss&& loss, double step = 1e-4) {
  return Matrix<double>(values.rows, values.cols, [&](Index r, Index c) {
    const double kept = values(r, c);
    values(r, c) = kept + step;
    const double above = loss();
    values(r, c) = kept - step;
    const double below = loss();
    values(r, c) = kept;
    return (above - below) / (2 * step);
  });
}

/// Empty if `gradient` agrees with the difference quotients, else the worst cell.
template <class Loss>
std::string gradient_error(MatView<double> values, MatView<const double> gradient, Loss&& loss,
                           Close close = {1e-6, 1e-7}, double step = 1e-4) {
  return difference(gradient, difference_quotients(values, loss, step), close);
}

/// Σ weight(r, c) · y(r, c): the loss whose gradient by y is `weight`.
template <class A, class B>
double weighted_sum(const A& weight, const B& y) {
  const auto w = detail::view_of(weight);
  const auto v = detail::view_of(y);
  double sum = 0;
  for (Index r = 0; r < w.rows; ++r) {
    for (Index c = 0; c < w.cols; ++c) sum += w(r, c) * v(r, c);
  }
  return sum;
}

}  // namespace test

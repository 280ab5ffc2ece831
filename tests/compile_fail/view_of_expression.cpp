// SPDX-License-Identifier: Apache-2.0
// expect: this is an Eigen expression.*Evaluate it into a row-major matrix first
#include <Eigen/Core>

#include "mole/core/view.hpp"

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

mole::Index rows_of(mole::MatView<const float> view) {
  return view.rows;
}

mole::Index call(const Matrix& a, const Matrix& b) {
#ifdef MOLE_COMPILE_FAIL
  return rows_of(a * b);
#else
  const Matrix product = a * b;
  return rows_of(product);
#endif
}

// SPDX-License-Identifier: Apache-2.0
// expect: this Eigen object is column-major.*Declare it with Eigen::RowMajor
#include <Eigen/Core>

#include "mole/core/view.hpp"

#ifdef MOLE_COMPILE_FAIL
constexpr int kOrder = Eigen::ColMajor;
#else
constexpr int kOrder = Eigen::RowMajor;
#endif

mole::Index rows_of(mole::MatView<float> view) {
  return view.rows;
}

mole::Index call() {
  Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, kOrder> matrix(3, 5);
  return rows_of(matrix);
}

// SPDX-License-Identifier: Apache-2.0
// expect: the elements of a row must lie side by side
#include <Eigen/Core>

#include "mole/core/view.hpp"

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

#ifdef MOLE_COMPILE_FAIL
using Stride = Eigen::Stride<Eigen::Dynamic, 2>;
#else
using Stride = Eigen::Stride<Eigen::Dynamic, 1>;
#endif

mole::Index rows_of(mole::MatView<float> view) {
  return view.rows;
}

mole::Index call(float* data) {
  Eigen::Map<Matrix, 0, Stride> map(data, 3, 5, Stride(20, Stride::InnerStrideAtCompileTime));
  return rows_of(map);
}

// SPDX-License-Identifier: Apache-2.0
#include "mole/eigen.hpp"

#include <type_traits>
#include <vector>

#include "support/catch.hpp"

using mole::as_eigen;
using mole::as_view;
using mole::Index;
using mole::MatView;

TEMPLATE_TEST_CASE("as_eigen looks at the same memory, gaps between the rows included", "[eigen]",
                   float, double) {
  using T = TestType;
  std::vector<T> memory(5 * 11);
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<T>(i);
  const MatView<T> view(memory.data(), 5, 7, 11);
  auto map = as_eigen(view);
  REQUIRE(map.rows() == 5);
  REQUIRE(map.cols() == 7);
  for (Index r = 0; r < 5; ++r) {
    for (Index c = 0; c < 7; ++c) CHECK(&map(r, c) == &view(r, c));
  }
  map *= T(2);
  CHECK(view(4, 6) == T(2 * (4 * 11 + 6)));
  CHECK(memory[7] == T(7));

  const auto constant = as_eigen(MatView<const T>(view));
  static_assert(std::is_const_v<std::remove_reference_t<decltype(constant(0, 0))>> ||
                std::is_same_v<decltype(constant(0, 0)), T>);
  CHECK(constant.sum() == map.sum());
}

TEST_CASE("as_view takes shape, stride and constness from Eigen", "[eigen]") {
  mole::RowMajorMatrix<double> matrix(5, 7);
  static_assert(std::is_same_v<decltype(as_view(matrix)), MatView<double>>);
  static_assert(std::is_same_v<decltype(as_view(std::as_const(matrix))), MatView<const double>>);
  const MatView<double> whole = as_view(matrix);
  CHECK((whole.data == matrix.data() && whole.rows == 5 && whole.cols == 7 && whole.stride == 7));

  const MatView<double> block = as_view(matrix.block(1, 2, 3, 4));
  CHECK((block.data == &matrix(1, 2) && block.rows == 3 && block.cols == 4 && block.stride == 7));
  CHECK(&block(2, 3) == &matrix(3, 5));

  Eigen::VectorXd column(6);
  const MatView<double> vector = as_view(column);
  CHECK((vector.rows == 6 && vector.cols == 1 && &vector(5, 0) == &column(5)));
}

TEST_CASE("a view survives the way through Eigen and back", "[eigen]") {
  std::vector<float> memory(4 * 9);
  const MatView<float> view(memory.data(), 4, 5, 9);
  const MatView<float> back = as_view(as_eigen(view));
  CHECK((back.data == view.data && back.rows == 4 && back.cols == 5 && back.stride == 9));
  const MatView<const float> empty = as_view(as_eigen(MatView<const float>()));
  CHECK(empty.empty());
}

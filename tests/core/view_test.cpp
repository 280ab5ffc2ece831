// SPDX-License-Identifier: Apache-2.0
#include "mole/core/view.hpp"

#if __has_include(<Eigen/Core>)
#include <Eigen/Core>
#else
#include <eigen3/Eigen/Core>
#endif
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"

using mole::Errc;
using mole::Index;
using mole::MatView;

namespace {

using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowBlock = Eigen::Ref<RowMatrix, 0, Eigen::OuterStride<>>;

static_assert(std::is_trivially_copyable_v<MatView<float>>);
static_assert(std::is_standard_layout_v<MatView<float>>);
static_assert(std::is_nothrow_default_constructible_v<MatView<float>>);
static_assert(std::is_convertible_v<MatView<float>, MatView<const float>>);
static_assert(!std::is_convertible_v<MatView<const float>, MatView<float>>);
static_assert(!std::is_convertible_v<MatView<double>, MatView<float>>);
static_assert(!std::is_convertible_v<std::span<float>, MatView<float>>);
static_assert(!std::is_constructible_v<MatView<float>, std::span<float>>);
static_assert(!std::is_constructible_v<MatView<float>, std::vector<float>&>);
static_assert(!std::is_constructible_v<MatView<float>, float*>);
static_assert(std::is_convertible_v<RowMatrix&, MatView<float>>);
static_assert(std::is_convertible_v<const RowMatrix&, MatView<const float>>);
static_assert(
    std::is_same_v<decltype(MatView(static_cast<float*>(nullptr), 2, 3)), MatView<float>>);
static_assert(std::is_same_v<decltype(MatView(static_cast<const int*>(nullptr), 2, 3, 4)),
                             MatView<const int>>);

constexpr int kTable[] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr MatView<const int> kWindow(kTable, 2, 3, 4);
static_assert(MatView<float>(nullptr, 0, 9).col_block(8, 1).data == nullptr);
static_assert(kWindow(1, 2) == 6 && kWindow.row(1)[0] == 4 && kWindow.size() == 6);

/// 10 * row + column.
RowMatrix numbered(Index rows, Index cols) {
  RowMatrix m(rows, cols);
  for (Index r = 0; r < rows; ++r) {
    for (Index c = 0; c < cols; ++c) m(r, c) = static_cast<float>(10 * r + c);
  }
  return m;
}

/// The view shows the same elements, in the same memory, as the Eigen object.
template <class M>
bool shows(MatView<const float> view, const M& m) {
  if (view.rows != m.rows() || view.cols != m.cols() || view.stride < view.cols) return false;
  for (Index r = 0; r < view.rows; ++r) {
    for (Index c = 0; c < view.cols; ++c) {
      if (&view(r, c) != &m.coeffRef(r, c)) return false;
    }
  }
  return true;
}

/// A function of the kind the library has: the argument converts at the call.
float corner(MatView<const float> view) {
  return view(view.rows - 1, view.cols - 1);
}

template <class F>
Errc code_of(F&& f) {
  try {
    f();
  } catch (const mole::Error& error) {
    return error.code();
  }
  return Errc::internal;
}

}  // namespace

TEST_CASE("a view of an Eigen matrix") {
  RowMatrix m = numbered(3, 5);
  const MatView<float> view = m;
  CHECK(shows(view, m));
  CHECK(view.stride == 5);
  view(2, 1) = -1;
  CHECK(m(2, 1) == -1);
  CHECK(corner(m) == 24);
  const RowMatrix& constant = m;
  CHECK(shows(MatView<const float>(constant), m));
  const Eigen::Matrix<float, 2, 3, Eigen::RowMajor> fixed =
      Eigen::Matrix<float, 2, 3, Eigen::RowMajor>::Constant(7);
  CHECK(shows(fixed, fixed));
}

TEST_CASE("a view of an Eigen array") {
  Eigen::Array<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> a = numbered(3, 5).array();
  CHECK(shows(a, a));
}

TEST_CASE("a view of a block keeps the stride of the whole") {
  RowMatrix m = numbered(5, 7);
  auto block = m.block(1, 2, 3, 4);
  const MatView<float> view = block;
  CHECK(shows(view, block));
  CHECK(view.stride == 7);
  CHECK(view(2, 3) == 35);
  CHECK(shows(m.topRows(2), m.topRows(2)));
  CHECK(shows(m.rightCols(3), m.rightCols(3)));
  const RowMatrix& constant = m;
  CHECK(corner(constant.block(1, 2, 3, 4)) == 35);
}

TEST_CASE("a view of a map with an outer stride") {
  RowMatrix m = numbered(4, 6);
  const Eigen::Map<RowMatrix, 0, Eigen::OuterStride<>> map(m.data(), 2, 5,
                                                           Eigen::OuterStride<>(12));
  const MatView<const float> view = map;
  CHECK(shows(view, map));
  CHECK(view.stride == 12);
  CHECK(view(1, 4) == 24);
  const Eigen::Map<const RowMatrix> plain(m.data(), 3, 8);
  CHECK(shows(plain, plain));
}

TEST_CASE("a view of a reference") {
  RowMatrix m = numbered(5, 7);
  RowBlock whole = m;
  CHECK(shows(MatView<float>(whole), m));
  RowBlock part = m.block(2, 1, 3, 2);
  CHECK(shows(MatView<float>(part), part));
  CHECK(MatView<float>(part).stride == 7);
  const Eigen::Ref<const RowMatrix> constant = m;
  CHECK(shows(constant, m));
}

TEST_CASE("a column vector is a matrix of one column") {
  Eigen::VectorXf v = Eigen::VectorXf::LinSpaced(4, 0, 3);
  const MatView<float> view = v;
  CHECK(shows(view, v));
  CHECK(view.rows == 4);
  CHECK(view.cols == 1);
  CHECK(view.stride == 1);
  const Eigen::Map<Eigen::VectorXf, 0, Eigen::InnerStride<>> every_second(v.data(), 2,
                                                                          Eigen::InnerStride<>(2));
  CHECK(shows(every_second, every_second));
  CHECK(MatView<const float>(every_second).stride == 2);
  RowMatrix m = numbered(3, 5);
  CHECK(shows(m.col(2), m.col(2)));
  CHECK(MatView<float>(m.col(2))(2, 0) == 22);
  CHECK(shows(v.segment(1, 2), v.segment(1, 2)));
  Eigen::Matrix<float, Eigen::Dynamic, 1, Eigen::ColMajor> tall = v;
  CHECK(shows(tall, tall));
}

TEST_CASE("a row vector is a matrix of one row") {
  Eigen::RowVectorXf v = Eigen::RowVectorXf::LinSpaced(4, 0, 3);
  const MatView<float> view = v;
  CHECK(shows(view, v));
  CHECK(view.rows == 1);
  CHECK(view.cols == 4);
  RowMatrix m = numbered(3, 5);
  CHECK(shows(m.row(1), m.row(1)));
  CHECK(MatView<float>(m.row(1))(0, 4) == 14);
}

TEST_CASE("a view of an empty matrix is empty") {
  RowMatrix none(0, 5);
  CHECK(MatView<float>(none).empty());
  CHECK(MatView<float>(none).cols == 5);
  CHECK(MatView<float>().empty());
  CHECK(MatView<float>().size() == 0);
}

TEST_CASE("a span becomes a view with an explicit shape") {
  std::vector<float> v(6);
  const MatView<float> view(std::span<float>(v), 2, 3);
  CHECK(view.data == v.data());
  CHECK(view.rows == 2);
  CHECK(view.stride == 3);
  CHECK(MatView<const float>(std::span<const float>(v), 6, 1).rows == 6);
  CHECK(MatView<float>(std::span<float>(), 0, 4).empty());
  const auto row = mole::as_row(std::span<float>(v));
  CHECK(row.rows == 1);
  CHECK(row.cols == 6);
  CHECK(row.data == v.data());
}

TEST_CASE("a span of another size is refused") {
  std::vector<float> v(6);
  const std::span<float> span(v);
  CHECK_THROWS_WITH(MatView<float>(span, 2, 4), "span of 6 elements cannot be a 2 x 4 matrix");
  CHECK(code_of([&] { MatView<float>(span, 2, 2); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { MatView<float>(span, -2, -3); }) == Errc::shape_mismatch);
}

TEST_CASE("rows, blocks of rows and blocks of columns look at the same memory") {
  RowMatrix m = numbered(5, 7);
  const MatView<float> view = m.block(0, 1, 5, 4);
  CHECK(view.row(3).size() == 4);
  CHECK(&view.row(3)[2] == &m(3, 3));
  CHECK(shows(view.row_block(1, 3), m.block(1, 1, 3, 4)));
  CHECK(shows(view.col_block(1, 2), m.block(0, 2, 5, 2)));
  CHECK(shows(view.row_block(2, 2).col_block(3, 1), m.block(2, 4, 2, 1)));
  CHECK(view.row_block(5, 0).empty());
  CHECK(view.size() == 20);
}

TEST_CASE("require_shape names the argument, what it expected and what came") {
  RowMatrix m = numbered(3, 5);
  const MatView<const float> view = m;
  CHECK_NOTHROW(mole::require_shape("x", view, 3, 5));
  CHECK_THROWS_WITH(mole::require_shape("x", view, 3, 4), "x: expected [3, 4], got [3, 5]");
  CHECK(code_of([&] { mole::require_shape("x", view, 5, 3); }) == Errc::shape_mismatch);
}

TEST_CASE("require_shape refuses views without memory and rows that overlap") {
  float memory[15] = {};
  CHECK(code_of([] { mole::require_shape("x", MatView<float>(nullptr, 3, 5), 3, 5); }) ==
        Errc::invalid_argument);
  CHECK_THROWS_WITH(mole::require_shape("x", MatView<float>(memory, 3, 5, 4), 3, 5),
                    "x: needs memory and a row stride of at least 5, got stride 4");
  CHECK_NOTHROW(mole::require_shape("x", MatView<float>(nullptr, 0, 5), 0, 5));
}

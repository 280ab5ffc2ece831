// SPDX-License-Identifier: Apache-2.0
// An owning matrix for tests: row stride above the columns, and a known pattern in the padding.
#pragma once

#include <cstdint>
#include <vector>

#include "mole/core/random.hpp"
#include "mole/core/view.hpp"

namespace test {

using mole::Index;
using mole::MatView;

template <class T>
class Matrix {
 public:
  Matrix() = default;
  /// Zeros. `padding` elements after every row hold a pattern that nobody may change.
  Matrix(Index rows, Index cols, Index padding = 3)
      : rows_(rows), cols_(cols), values_(static_cast<std::size_t>(rows * (cols + padding))) {
    for (Index r = 0; r < rows; ++r) {
      for (Index c = cols; c < stride(); ++c) values_[r * stride() + c] = pattern(r, c);
    }
  }
  /// Every element f(row, column).
  template <class F>
  requires std::is_invocable_v<F, Index, Index> Matrix(Index rows, Index cols, F&& f)
      : Matrix(rows, cols) {
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < cols; ++c) (*this)(r, c) = static_cast<T>(f(r, c));
    }
  }

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  T& operator()(Index row, Index col) { return values_[row * stride() + col]; }
  const T& operator()(Index row, Index col) const { return values_[row * stride() + col]; }
  MatView<T> view() { return {values_.data(), rows_, cols_, stride()}; }
  MatView<const T> view() const { return {values_.data(), rows_, cols_, stride()}; }
  operator MatView<T>() { return view(); }              // NOLINT(google-explicit-constructor)
  operator MatView<const T>() const { return view(); }  // NOLINT(google-explicit-constructor)

  bool padding_is_intact() const {
    for (Index r = 0; r < rows_; ++r) {
      for (Index c = cols_; c < stride(); ++c) {
        if ((*this)(r, c) != pattern(r, c)) return false;
      }
    }
    return true;
  }

 private:
  Index stride() const { return rows_ == 0 ? cols_ : static_cast<Index>(values_.size()) / rows_; }
  static T pattern(Index r, Index c) { return static_cast<T>(-1000 - 7 * r - c); }

  Index rows_ = 0, cols_ = 0;
  std::vector<T> values_;
};

/// Uniform in [-1, 1), on a grid of 2^-7 that bf16, f16, float and double all hold exactly.
template <class T = double>
Matrix<T> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  const mole::Random random(seed, 17);
  return Matrix<T>(rows, cols, [&](Index r, Index c) {
    const auto n = static_cast<std::uint64_t>(r * cols + c);
    return (static_cast<double>(random.below(n, 256)) - 128) / 128;
  });
}

template <class To, class From>
Matrix<To> converted(const Matrix<From>& from) {
  return Matrix<To>(from.rows(), from.cols(),
                    [&](Index r, Index c) { return static_cast<To>(from(r, c)); });
}

}  // namespace test

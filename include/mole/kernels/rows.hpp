// SPDX-License-Identifier: Apache-2.0
// Elementwise work on matrices, row by row, and weights stacked in one matrix.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"
#include "mole/kernels/chain_product.hpp"

namespace mole::inline MOLE_ABI::rows {

template <class T>
void fill(MatView<T> to, std::type_identity_t<T> value) noexcept {
  for (Index r = 0; r < to.rows; ++r) std::ranges::fill(to.row(r), value);
}

template <class T>
void copy(MatView<const T> from, MatView<T> to) noexcept {
  for (Index r = 0; r < to.rows; ++r) std::ranges::copy(from.row(r), to.row(r).begin());
}

/// to += scale · from
template <class T>
void add(std::type_identity_t<T> scale, MatView<const T> from, MatView<T> to) noexcept {
  for (Index r = 0; r < to.rows; ++r) {
    for (Index c = 0; c < to.cols; ++c) to(r, c) = std::fma(scale, from(r, c), to(r, c));
  }
}

/// Row i of `to` is row index[i] of `from`.
template <class T>
void gather(MatView<const T> from, std::span<const std::int32_t> index, MatView<T> to) noexcept {
  for (std::size_t i = 0; i < index.size(); ++i) {
    std::ranges::copy(from.row(index[i]), to.row(static_cast<Index>(i)).begin());
  }
}

/// Row index[i] of `to` += row i of `from`.
template <class T>
void scatter_add(MatView<const T> from, std::span<const std::int32_t> index,
                 MatView<T> to) noexcept {
  for (std::size_t i = 0; i < index.size(); ++i) {
    for (Index c = 0; c < to.cols; ++c) to(index[i], c) += from(static_cast<Index>(i), c);
  }
}

/// Block `i` of `each` rows; nothing of nothing.
template <class V>
MatView<V> block(MatView<V> stack, Index i, Index each) noexcept {
  return stack.data == nullptr ? MatView<V>() : stack.row_block(i * each, each);
}

/// 0, 1, ..., count - 1, for kernels that want a list of rows.
inline std::span<const std::int32_t> every(Index count, Workspace& memory) {
  const auto list = memory.take<std::int32_t>(count);
  std::iota(list.begin(), list.end(), 0);
  return list;
}

/// A copy in memory of its own; nothing of nothing.
template <class T>
MatView<const T> clone(MatView<const T> from, Workspace& memory) {
  if (from.data == nullptr) return {};
  const MatView<T> to = memory.template take<T>(from.rows, from.cols);
  copy(from, to);
  return to;
}

/// A weight [cols, depth] packed into memory of its own.
template <class T>
Panels<T> pack(MatView<const T> weight, Workspace& memory) {
  return pack_panels(weight, memory.template take<T>(weight.rows, weight.cols).data);
}

}  // namespace mole::inline MOLE_ABI::rows

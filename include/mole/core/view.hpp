// SPDX-License-Identifier: Apache-2.0
// MatView: the only matrix in public signatures. A row-major window over memory that somebody else
// owns: a pointer, rows, columns and the distance between rows. It is trivially copyable, promises
// no alignment and never copies elements.
//
// It converts implicitly from any row-major Eigen object with direct access (Matrix, Map, Ref,
// Block, vectors), without including Eigen. Column-major matrices and expressions do not compile.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {

namespace detail {

/// Looks like an Eigen dense object: a plain type behind it, rows and columns.
template <class M>
concept EigenLike = requires(std::remove_cvref_t<M>& m) {
  typename std::remove_cvref_t<M>::PlainObject;
  m.rows();
  m.cols();
  m.derived();
};

/// Its elements lie in memory with a stride.
template <class M>
concept DirectAccess = EigenLike<M> && requires(std::remove_cvref_t<M>& m) {
  m.data();
  m.outerStride();
  m.innerStride();
};

template <class M>
constexpr bool is_column_vector = std::remove_cvref_t<M>::ColsAtCompileTime == 1;

template <class M>
constexpr bool is_row_major = std::remove_cvref_t<M>::IsRowMajor || is_column_vector<M>;

template <class M>
constexpr bool has_unit_steps =
    is_column_vector<M> || std::remove_cvref_t<M>::InnerStrideAtCompileTime == 1;

}  // namespace detail

template <class T>
struct MatView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index stride = 0;  ///< elements between the starts of two rows, at least `cols`

  constexpr MatView() = default;
  constexpr MatView(T* data, Index rows, Index cols, Index stride) noexcept
      : data(data), rows(rows), cols(cols), stride(stride) {}
  constexpr MatView(T* data, Index rows, Index cols) noexcept : MatView(data, rows, cols, cols) {}

  /// A span has no shape of its own; it must hold exactly rows * cols elements.
  /// Throws shape_mismatch.
  constexpr MatView(std::span<T> elements, Index rows, Index cols)
      : MatView(elements.data(), rows, cols) {
    require(rows >= 0 && cols >= 0 && static_cast<Index>(elements.size()) == rows * cols,
            Errc::shape_mismatch, "span of ", elements.size(), " elements cannot be a ", rows,
            " x ", cols, " matrix");
  }

  /// Any row-major Eigen object with direct access.
  template <class M>
  requires detail::EigenLike<M>
  constexpr MatView(M&& m) noexcept {  // NOLINT(google-explicit-constructor): the point of it
    static_assert(detail::DirectAccess<M>,
                  "mole::MatView: this is an Eigen expression, it has no memory to look at. "
                  "Evaluate it into a row-major matrix first.");
    if constexpr (detail::DirectAccess<M>) {
      static_assert(detail::is_row_major<M>,
                    "mole::MatView: this Eigen object is column-major. Declare it with "
                    "Eigen::RowMajor, or copy it into a row-major matrix.");
      static_assert(detail::has_unit_steps<M>,
                    "mole::MatView: the elements of a row must lie side by side.");
      data = m.data();
      rows = m.rows();
      cols = m.cols();
      stride = detail::is_column_vector<M> && !std::remove_cvref_t<M>::IsRowMajor ? m.innerStride()
                                                                                  : m.outerStride();
    }
  }

  constexpr operator MatView<const T>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<T>) {
    return {data, rows, cols, stride};
  }

  constexpr T& operator()(Index row, Index col) const noexcept { return data[row * stride + col]; }
  constexpr std::span<T> row(Index row) const noexcept {
    return {data + row * stride, static_cast<std::size_t>(cols)};
  }
  constexpr MatView row_block(Index first, Index count) const noexcept {
    return {data + first * stride, count, cols, stride};
  }
  constexpr MatView col_block(Index first, Index count) const noexcept {
    return {rows > 0 ? data + first : data, rows, count, stride};  // without rows it may be null
  }
  constexpr Index size() const noexcept { return rows * cols; }
  constexpr bool empty() const noexcept { return rows == 0 || cols == 0; }
};

template <class T>
MatView(T*, Index, Index) -> MatView<T>;
template <class T>
MatView(T*, Index, Index, Index) -> MatView<T>;

/// A row vector over contiguous elements.
template <class T>
constexpr MatView<T> as_row(std::span<T> elements) noexcept {
  return {elements.data(), 1, static_cast<Index>(elements.size())};
}

/// Throws shape_mismatch unless `view` is rows x cols; invalid_argument unless it has memory,
/// aligned for its elements, and stride >= cols. The message reads "y: expected [32, 512], got [32,
/// 511]".
template <class T>
void require_shape(std::string_view what, MatView<T> view, Index rows, Index cols) {
  require(view.rows == rows && view.cols == cols, Errc::shape_mismatch, what, ": expected [", rows,
          ", ", cols, "], got [", view.rows, ", ", view.cols, "]");
  require(view.empty() || (view.data != nullptr && view.stride >= cols), Errc::invalid_argument,
          what, ": needs memory and a row stride of at least ", cols, ", got stride ", view.stride);
  const std::size_t off = reinterpret_cast<std::uintptr_t>(view.data) % alignof(T);
  require(view.empty() || off == 0, Errc::invalid_argument, what, ": its memory lies ", off,
          " bytes off the alignment of its elements, ", alignof(T));
}

/// Throws invalid_argument if writing `output` could change `input`. Views of equal stride may
/// share rows as long as their columns are apart; other views must not share a range of memory.
template <class T>
void require_apart(std::string_view output_name, MatView<T> output, std::string_view input_name,
                   MatView<const T> input) {
  if (output.empty() || input.empty()) return;
  const auto bytes = [](const auto& view) {
    return ((view.rows - 1) * view.stride + view.cols) * static_cast<Index>(sizeof(T));
  };
  const auto out = reinterpret_cast<std::intptr_t>(output.data);
  const auto in = reinterpret_cast<std::intptr_t>(input.data);
  if (out + bytes(output) <= in || in + bytes(input) <= out) return;
  const Index shift = (in - out) / static_cast<Index>(sizeof(T)) % output.stride;
  const Index first = shift < 0 ? shift + output.stride : shift;  // column of `output` input is at
  const bool same_rows = output.stride == input.stride;
  if (same_rows && first >= output.cols && first + input.cols <= output.stride) return;
  fail(Errc::invalid_argument, output_name, ": overlaps ", input_name, ": ", output_name, " has ",
       bytes(output), " bytes, ", input_name, " has ", bytes(input), " bytes and starts ", in - out,
       " bytes after it");
}

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// Between MatView and Eigen, without copies. The only public header that names Eigen.
#pragma once

#include <Eigen/Core>
#include <type_traits>

#include "mole/core/half.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
using RowMajorMatrix =
    Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The Eigen object over the same memory; read-only if T is const.
template <class T>
using EigenView =
    Eigen::Map<std::conditional_t<std::is_const_v<T>, const RowMajorMatrix<T>, RowMajorMatrix<T>>,
               Eigen::Unaligned, Eigen::OuterStride<>>;

template <class T>
EigenView<T> as_eigen(MatView<T> view) {
  static_assert(!is_half<std::remove_const_t<T>>, "Eigen cannot compute with a stored half");
  return {view.data, view.rows, view.cols, Eigen::OuterStride<>(view.stride)};
}

/// The view of a row-major Eigen object with memory, constant if the object is. Temporaries that
/// own their memory do not compile: nothing would be left to look at.
template <class M>
requires detail::EigenLike<M>
auto as_view(M&& m) noexcept {
  static_assert(detail::DirectAccess<M>, "mole::as_view: an Eigen expression has no memory");
  static_assert(std::is_lvalue_reference_v<M&&> ||
                    !std::is_base_of_v<Eigen::PlainObjectBase<std::remove_cvref_t<M>>,
                                       std::remove_cvref_t<M>>,
                "mole::as_view: this matrix dies at the end of the statement");
  return MatView<std::remove_pointer_t<decltype(m.data())>>(m);
}

}  // namespace mole::inline MOLE_ABI

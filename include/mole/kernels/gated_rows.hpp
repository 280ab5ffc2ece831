// SPDX-License-Identifier: Apache-2.0
// Loops over slots between two matrices that each have a row per token or per slot. row(s) is the
// row of slot s in its matrix; g_s its gate. Only active slots count, and rows without one are
// never touched; `dot_rows` also visits the probes.
//
//   add_rows   to[row(s)] += g_s from[row(s)]                experts ascending
//   dot_rows   dgate[s]   += a[row(s)] · b[row(s)] + β_e · dy[row(s)]
//   sum_rows   dβ         += Σ_s g_s dy[row(s)]              slots ascending
//
// Every loop is parallel and gives the same bits for any number of workers.
#pragma once

#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/gated.hpp"

namespace mole::inline MOLE_ABI::gated {

/// token_begin [tokens + 1], gate [slots]. `from` with a row stride of 0 is one row for all.
template <class T>
void add_rows(std::span<const std::int32_t> token_begin, std::span<const T> gate,
              MatView<const T> from, RowsBy from_rows, MatView<T> to, RowsBy to_rows,
              const Context& context) noexcept;

/// For all slots. bias: [experts] of [1, columns of dy], or empty.
template <class T>
void dot_rows(const SlotLists& lists, MatView<const T> a, RowsBy a_rows, MatView<const T> b,
              RowsBy b_rows, std::span<const MatView<const T>> bias, MatView<const T> dy,
              RowsBy y_rows, std::span<T> dgate, const Context& context) noexcept;

/// dbias [1, columns of dy].
template <class T>
void sum_rows(std::span<const std::int32_t> token_begin, std::span<const T> gate,
              MatView<const T> dy, RowsBy y_rows, MatView<T> dbias,
              const Context& context) noexcept;

}  // namespace mole::inline MOLE_ABI::gated

#ifdef MOLE_HEADER_ONLY
#include "mole/kernels/gated_rows_loops.hpp"
#endif

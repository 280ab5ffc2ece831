// SPDX-License-Identifier: Apache-2.0
// Loops for banks whose experts share a factor. The shared product is made once per row that has a
// slot, in matrices with one row per token or per slot; rows without a slot are never touched.
//
//   mix        to[row]   = Σ_s q_s from[s]     over the active slots of a row, experts ascending
//   multiply   to[row]   = or += from[row] W   over the rows of a list
//   outer      dW       += Σ a[row]ᵀ b[row]    over the rows of a list
//
// Every loop is parallel and gives the same bits for any number of workers.
#pragma once

#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/chain_product.hpp"
#include "mole/kernels/gated.hpp"

namespace mole::inline MOLE_ABI::gated {

/// Ascending row numbers.
using Rows = std::span<const std::int32_t>;

/// The rows (tokens, or slots) that have a slot of `which`, written into the front of `memory`
/// [tokens or slots]. token_begin [tokens + 1], gate [slots].
template <class T>
Rows used_rows(std::span<const std::int32_t> token_begin, std::span<const T> gate, RowsBy by,
               Slots which, std::span<std::int32_t> memory) noexcept;

/// to[row] = Σ_s q_s from[s], q_s = gate[s] * scale[expert[s]], one chain from 0 over the active
/// slots of the row. from [slots, rank], to [tokens or slots, rank].
template <class T>
void mix(std::span<const std::int32_t> token_begin, std::span<const std::int32_t> expert,
         std::span<const T> gate, std::span<const T> scale, MatView<const T> from, MatView<T> to,
         RowsBy to_rows, const Context& context) noexcept;

/// to[row] = from[row] W, or += with `add`. weight: W packed.
template <class T>
void multiply(Rows rows, MatView<const T> from, const Panels<T>& weight, bool add, MatView<T> to,
              const Context& context) noexcept;

/// The same with W [from columns, to columns] as it is.
template <class T>
void multiply(Rows rows, MatView<const T> from, MatView<const T> weight, bool add, MatView<T> to,
              const Context& context) noexcept;

/// dweight += Σ a[row]ᵀ b[row], one chain over the rows.
template <class T>
void outer(Rows rows, MatView<const T> a, MatView<const T> b, MatView<T> dweight,
           const Context& context) noexcept;

}  // namespace mole::inline MOLE_ABI::gated

#ifdef MOLE_HEADER_ONLY
#include "mole/kernels/shared_low_rank_loops.hpp"
#endif

// SPDX-License-Identifier: Apache-2.0
// The gated low-rank product, cut into its loops. s is a slot of expert e; row(s) is its token, or
// s.
//
//   forward    hidden[s]  = x[row(s)] A_eᵀ              scaled[s] = q_s hidden[s]
//              y[row(s)] += scaled[s] B_eᵀ + q_s β_e    experts ascending
//   backward   v[s]       = dy[row(s)] B_e              dscaled[s] = q_s v[s]
//              x[row(s)] += dscaled[s] A_e              experts ascending
//              dB_e      += Σ_s dy[row(s)] scaled[s]ᵀ   dA_e += Σ_s dscaled[s] x[row(s)]ᵀ
//
// Every loop is parallel and gives the same bits for any number of workers.
#pragma once

#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/chain_product.hpp"
#include "mole/kernels/gated.hpp"

namespace mole::inline MOLE_ABI::gated {

/// hidden[s, 0 ... rank_e) = x[row(s)] A_eᵀ for the slots of `which`. down: Aᵀ packed, per expert.
template <class T>
void down(const SlotLists& lists, Slots which, std::span<const Panels<T>> down, MatView<const T> x,
          RowsBy x_rows, MatView<T> hidden, const Context& context) noexcept;

/// scaled[s] = q_s hidden[row(s)] on active slots, q_s = gate[s] * scale[expert], for the ranks
/// rank_begin[e + 1] - rank_begin[e] of its expert. May work in place if rows are slots.
template <class T>
void apply_gates(const SlotLists& lists, std::span<const T> gate, std::span<const T> scale,
                 std::span<const Index> rank_begin, MatView<const T> hidden, RowsBy hidden_rows,
                 MatView<T> scaled, const Context& context) noexcept;

/// y[row(s)] += scaled[s] B_eᵀ + q_s β_e on active slots. up: all Bᵀ stacked and packed, expert e
/// owns rows rank_begin[e] ... rank_begin[e + 1]. bias: [experts, out] or empty.
template <class T>
void up(const SlotLists& lists, std::span<const T> gate, std::span<const T> scale,
        MatView<const T> scaled, const Panels<T>& up, std::span<const Index> rank_begin,
        MatView<const T> bias, MatView<T> y, RowsBy y_rows, const Context& context) noexcept;

/// All of forward where every token has every expert: gate [tokens, experts] has no zero, hidden is
/// scratch [tokens, total rank]. One product over all ranks; the same bits as the loops above.
template <class T>
void dense_forward(MatView<const T> gate, std::span<const T> scale, MatView<const T> x,
                   std::span<const Panels<T>> down, const Panels<T>& up,
                   std::span<const Index> rank_begin, MatView<T> hidden, MatView<T> y,
                   const Context& context) noexcept;

/// v[s, 0 ... rank_e) = dy[row(s)] B_e for all slots, probes included.
template <class T>
void up_transposed(const SlotLists& lists, std::span<const MatView<const T>> up,
                   MatView<const T> dy, RowsBy y_rows, MatView<T> v,
                   const Context& context) noexcept;

/// dx[row(s)] += dscaled[s] A_e on active slots.
template <class T>
void down_transposed(const SlotLists& lists, MatView<const T> dscaled,
                     std::span<const MatView<const T>> down, MatView<T> dx, RowsBy x_rows,
                     const Context& context) noexcept;

/// dup_e += Σ_s dy[row(s)] scaled[s]ᵀ on active slots, for every expert.
template <class T>
void up_gradient(const SlotLists& lists, MatView<const T> dy, RowsBy y_rows,
                 MatView<const T> scaled, std::span<const MatView<T>> dup,
                 const Context& context) noexcept;

/// ddown_e += Σ_s dscaled[s] x[row(s)]ᵀ on active slots, for every expert.
template <class T>
void down_gradient(const SlotLists& lists, MatView<const T> dscaled, MatView<const T> x,
                   RowsBy x_rows, std::span<const MatView<T>> ddown,
                   const Context& context) noexcept;

/// dbias_e += Σ_s q_s dy[row(s)] on active slots.
template <class T>
void bias_gradient(const SlotLists& lists, std::span<const T> gate, std::span<const T> scale,
                   MatView<const T> dy, RowsBy y_rows, std::span<const MatView<T>> dbias,
                   const Context& context) noexcept;

/// dgate[s] += scale (by_slot[s] · by_row[row(s)] + β · dy[row(s)]) for all slots, probes included:
/// one chain over the ranks of the expert, then the outputs. bias: [experts] of [1, out], or empty.
template <class T>
void gate_gradient(const SlotLists& lists, std::span<const T> scale,
                   std::span<const Index> rank_begin, MatView<const T> by_slot,
                   MatView<const T> by_row, RowsBy rows, std::span<const MatView<const T>> bias,
                   MatView<const T> dy, RowsBy y_rows, std::span<T> dgate,
                   const Context& context) noexcept;

/// Σ_i a_i b_i: one chain from 0.
template <class T>
T dot(std::span<const T> a, std::span<const T> b) noexcept;

}  // namespace mole::inline MOLE_ABI::gated

#ifdef MOLE_HEADER_ONLY
#include "mole/kernels/gated_low_rank_loops.hpp"
#endif

// SPDX-License-Identifier: Apache-2.0
// Definitions of kernels/shared_low_rank.hpp.
#pragma once

#include <algorithm>

#include "mole/kernels/gated_low_rank.hpp"
#include "mole/kernels/shared_low_rank.hpp"

namespace mole::inline MOLE_ABI::gated {

template <class T>
Rows used_rows(std::span<const std::int32_t> token_begin, std::span<const T> gate, RowsBy by,
               Slots which, std::span<std::int32_t> memory) noexcept {
  const auto used = [&](std::int32_t s) { return which == Slots::all || gate[s] != T(0); };
  std::size_t count = 0;
  for (std::size_t t = 0; t + 1 < token_begin.size(); ++t) {
    for (std::int32_t s = token_begin[t]; s < token_begin[t + 1]; ++s) {
      if (!used(s)) continue;
      memory[count++] = by == RowsBy::token ? static_cast<std::int32_t>(t) : s;
      if (by == RowsBy::token) break;
    }
  }
  return memory.first(count);
}

/// to [1, rank] = Σ q_s from[s] over the active slots in [begin, end).
template <class T>
void mix_slots(Index begin, Index end, std::span<const std::int32_t> expert,
               std::span<const T> gate, std::span<const T> scale, MatView<const T> from,
               MatView<T> to, Isa isa) noexcept {
  T q[kSlotTile];
  std::int32_t slot[kSlotTile];
  ChainProduct<T> p;
  p.rows = 1;
  p.cols = to.cols;
  const MatView<T> by_depth(q, kSlotTile, 1);
  p.a = MatView<const T>(by_depth);
  p.b = {from, slot};
  p.c = to;
  p.a_by_depth = true;
  p.from_zero = true;
  for (Index s = begin; s < end; ++s) {
    if (gate[s] != T(0)) {
      q[p.depth] = gate[s] * scale[expert[s]];
      slot[p.depth++] = static_cast<std::int32_t>(s);
    }
    if (p.depth < kSlotTile) continue;
    chain_product(p, isa);
    p.depth = 0;
    p.from_zero = false;
  }
  if (p.depth > 0 || p.from_zero) chain_product(p, isa);
}

template <class T>
void mix(std::span<const std::int32_t> token_begin, std::span<const std::int32_t> expert,
         std::span<const T> gate, std::span<const T> scale, MatView<const T> from, MatView<T> to,
         RowsBy to_rows, const Context& context) noexcept {
  const auto tile = [&](Index first, Index count) {
    for (Index t = first; t < first + count; ++t) {
      for (Index s = token_begin[t]; to_rows == RowsBy::slot && s < token_begin[t + 1]; ++s) {
        mix_slots(s, s + 1, expert, gate, scale, from, to.row_block(s, 1), context.isa);
      }
      if (to_rows == RowsBy::token) {
        mix_slots(token_begin[t], token_begin[t + 1], expert, gate, scale, from, to.row_block(t, 1),
                  context.isa);
      }
    }
  };
  const auto tokens = static_cast<Index>(token_begin.size()) - 1;
  const Index slots = static_cast<Index>(expert.size());
  for_each_block(tokens, kSlotTile, slots * from.cols / std::max<Index>(tokens, 1), context, tile);
}

/// body(first, rows, column, columns) over tiles of the listed rows of a matrix, in parallel.
template <class Body>
void for_each_row_tile(Rows rows, Index cols, Index depth, const Context& context, Body&& body) {
  const auto count = static_cast<Index>(rows.size());
  const Index blocks = (cols + kPanel - 1) / kPanel;
  const auto run = [&](Index first, Index last, int) {
    for (Index i = first; i < last; ++i) {
      const Index row = i / blocks * kSlotTile, col = i % blocks * kPanel;
      body(row, std::min(kSlotTile, count - row), col, std::min(kPanel, cols - col));
    }
  };
  const Index tiles = (count + kSlotTile - 1) / kSlotTile;
  const Index work = std::min(count, kSlotTile) * std::min(cols, kPanel) * depth;
  parallel_for(context, tiles * blocks, grain_for(work), run);
}

template <class T>
void multiply(Rows rows, MatView<const T> from, const Panels<T>& weight, bool add, MatView<T> to,
              const Context& context) noexcept {
  const auto tile = [&](Index first, Index count, Index col, Index) {
    const std::int32_t* list = rows.data() + first;
    panel_product<T>({from, list}, count, weight, col / kPanel, col / kPanel + 1, {to, list}, !add,
                     context.isa);
  };
  for_each_row_tile(rows, weight.cols, weight.depth, context, tile);
}

template <class T>
void multiply(Rows rows, MatView<const T> from, MatView<const T> weight, bool add, MatView<T> to,
              const Context& context) noexcept {
  const auto tile = [&](Index first, Index count, Index col, Index cols) {
    const std::int32_t* list = rows.data() + first;
    ChainProduct<T> p;
    p.rows = count;
    p.depth = weight.rows;
    p.cols = cols;
    p.a = {from, list};
    p.b = weight.col_block(col, cols);
    p.c = {to.col_block(col, cols), list};
    p.from_zero = !add;
    chain_product(p, context.isa);
  };
  for_each_row_tile(rows, weight.cols, weight.rows, context, tile);
}

template <class T>
void outer(Rows rows, MatView<const T> a, MatView<const T> b, MatView<T> dweight,
           const Context& context) noexcept {
  const Index row_blocks = (dweight.rows + kPanel - 1) / kPanel;
  const Index col_blocks = (dweight.cols + kColumnBlock - 1) / kColumnBlock;
  const auto run = [&](Index first, Index last, int) {
    for (Index i = first; i < last; ++i) {
      const Index row = i / col_blocks * kPanel, col = i % col_blocks * kColumnBlock;
      const Index cols = std::min(kColumnBlock, dweight.cols - col);
      ChainProduct<T> p;
      p.rows = std::min(kPanel, dweight.rows - row);
      p.depth = static_cast<Index>(rows.size());
      p.cols = cols;
      p.a = {a.col_block(row, p.rows), rows.data()};
      p.b = {b.col_block(col, cols), rows.data()};
      p.c = dweight.row_block(row, p.rows).col_block(col, cols);
      p.a_by_depth = true;
      chain_product(p, context.isa);
    }
  };
  const Index work = static_cast<Index>(rows.size()) * std::min(kPanel, dweight.rows) *
                     std::min(kColumnBlock, dweight.cols);
  parallel_for(context, row_blocks * col_blocks, grain_for(work), run);
}

}  // namespace mole::inline MOLE_ABI::gated

// SPDX-License-Identifier: Apache-2.0
// Definitions of kernels/gated_rows.hpp.
#pragma once

#include <algorithm>

#include "mole/kernels/gated_low_rank.hpp"
#include "mole/kernels/gated_rows.hpp"

namespace mole::inline MOLE_ABI::gated {

/// The active slots of a range, up to kSlotTile at a time, as operands of a sum of rows: `first`
/// slot of the range, or of the rest of it.
template <class T>
struct RowSum {
  T gate[kSlotTile];
  std::int32_t row[kSlotTile];
  Index count = 0;

  /// Returns the slot to go on with.
  Index collect(Index first, Index end, Index token, std::span<const T> gates,
                RowsBy rows) noexcept {
    Index s = first;
    for (; s < end && count < kSlotTile; ++s) {
      if (gates[s] == T(0)) continue;
      gate[count] = gates[s];
      row[count++] = static_cast<std::int32_t>(rows == RowsBy::token ? token : s);
    }
    return s;
  }
  /// to [1, columns] += Σ gate row of `from`.
  void add(MatView<const T> from, MatView<T> to, Isa isa) noexcept {
    if (count == 0) return;
    ChainProduct<T> p;
    p.rows = 1;
    p.depth = count;
    p.cols = to.cols;
    p.a = MatView<const T>(gate, count, 1);
    p.b = {from, row};
    p.c = to;
    p.a_by_depth = true;
    chain_product(p, isa);
    count = 0;
  }
};

template <class T>
void add_rows(std::span<const std::int32_t> token_begin, std::span<const T> gate,
              MatView<const T> from, RowsBy from_rows, MatView<T> to, RowsBy to_rows,
              const Context& context) noexcept {
  const auto tile = [&](Index first, Index count) {
    RowSum<T> sum;
    for (Index t = first; t < first + count; ++t) {
      const Index end = token_begin[t + 1];
      for (Index s = token_begin[t]; s < end;) {
        const Index stop = to_rows == RowsBy::slot ? s + 1 : end;
        const Index row = to_rows == RowsBy::slot ? s : t;
        s = sum.collect(s, stop, t, gate, from_rows);
        sum.add(from, to.row_block(row, 1), context.isa);
      }
    }
  };
  const auto tokens = static_cast<Index>(token_begin.size()) - 1;
  const Index slots = static_cast<Index>(gate.size());
  for_each_block(tokens, kSlotTile, slots * to.cols / std::max<Index>(tokens, 1), context, tile);
}

template <class T>
void dot_rows(const SlotLists& lists, MatView<const T> a, RowsBy a_rows, MatView<const T> b,
              RowsBy b_rows, std::span<const MatView<const T>> bias, MatView<const T> dy,
              RowsBy y_rows, std::span<T> dgate, const Context& context) noexcept {
  const auto body = [&](Index e, SlotRange range) {
    for (Index i = range.begin; i < range.end; ++i) {
      T sum = dot<T>(a.row(lists.rows(a_rows)[i]), b.row(lists.rows(b_rows)[i]));
      if (!bias.empty()) sum += dot<T>(bias[e].row(0), dy.row(lists.rows(y_rows)[i]));
      dgate[lists.slot_of[i]] += sum;
    }
  };
  const Index work = a.cols + (bias.empty() ? 0 : dy.cols);
  for_each_slot_tile(lists, Slots::all, work, context, body);
}

template <class T>
void sum_rows(std::span<const std::int32_t> token_begin, std::span<const T> gate,
              MatView<const T> dy, RowsBy y_rows, MatView<T> dbias,
              const Context& context) noexcept {
  const auto tokens = static_cast<Index>(token_begin.size()) - 1;
  const auto block = [&](Index first, Index count) {
    const MatView<const T> columns = dy.col_block(first, count);
    RowSum<T> sum;
    for (Index t = 0; t < tokens; ++t) {
      const Index end = token_begin[t + 1];
      for (Index s = token_begin[t]; s < end;) {
        s = sum.collect(s, end, t, gate, y_rows);
        if (sum.count == kSlotTile) sum.add(columns, dbias.col_block(first, count), context.isa);
      }
    }
    sum.add(columns, dbias.col_block(first, count), context.isa);
  };
  for_each_block(dy.cols, kPanel, static_cast<Index>(gate.size()), context, block);
}

}  // namespace mole::inline MOLE_ABI::gated

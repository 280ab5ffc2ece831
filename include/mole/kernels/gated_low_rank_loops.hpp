// SPDX-License-Identifier: Apache-2.0
// Definitions of kernels/gated_low_rank.hpp.
#pragma once

#include <cmath>

#include "mole/kernels/gated_low_rank.hpp"

namespace mole::inline MOLE_ABI::gated {

template <class T>
T dot(std::span<const T> a, std::span<const T> b) noexcept {
  T sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum = std::fma(a[i], b[i], sum);
  return sum;
}

/// c[:, block] += a b[:, block], or = with from_zero.
template <class T>
void product(RowList<const T> a, Index rows, MatView<const T> b, Index first, Index count,
             RowList<T> c, bool from_zero, Isa isa) noexcept {
  ChainProduct<T> p;
  p.rows = rows;
  p.depth = b.rows;
  p.cols = count;
  p.a = a;
  p.b = b.col_block(first, count);
  p.c = c;
  p.c.data += first;
  p.from_zero = from_zero;
  chain_product(p, isa);
}

/// c += aᵀ b, the sum over the `depth` rows that both lists pick.
template <class T>
void outer(RowList<const T> a, RowList<const T> b, Index depth, MatView<T> c, Isa isa) noexcept {
  ChainProduct<T> p;
  p.rows = c.rows;
  p.depth = depth;
  p.cols = c.cols;
  p.a = a;
  p.b = b;
  p.c = c;
  p.a_by_depth = true;
  chain_product(p, isa);
}

/// body(q [slots of the tile, 1], tile) for tiles of a range, q = gate * scale.
template <class T, class Body>
void for_each_gate_tile(const SlotLists& lists, SlotRange range, std::span<const T> gate, T scale,
                        Body&& body) {
  T q[kSlotTile];
  for (Index begin = range.begin; begin < range.end; begin += kSlotTile) {
    const SlotRange tile{begin, std::min(begin + kSlotTile, range.end)};
    for (Index i = 0; i < tile.size(); ++i) q[i] = gate[lists.slot_of[begin + i]] * scale;
    body(MatView<const T>(q, tile.size(), 1), tile);
  }
}

template <class T>
void down(const SlotLists& lists, Slots which, std::span<const Panels<T>> down, MatView<const T> x,
          RowsBy x_rows, MatView<T> hidden, const Context& context) noexcept {
  const auto body = [&](Index e, SlotRange range) {
    panel_product<T>(pick(x, lists.rows(x_rows), range), range.size(), down[e], 0, down[e].count(),
                     pick(hidden, lists.slot_of, range), true, context.isa);
  };
  for_each_slot_tile(lists, which, x.cols * hidden.cols, context, body);
}

template <class T>
void apply_gates(const SlotLists& lists, std::span<const T> gate, std::span<const T> scale,
                 std::span<const Index> rank_begin, MatView<const T> hidden, RowsBy hidden_rows,
                 MatView<T> scaled, const Context& context) noexcept {
  const auto body = [&](Index e, SlotRange range) {
    const Index rank = rank_begin[e + 1] - rank_begin[e];
    for (Index i = range.begin; i < range.end; ++i) {
      const Index s = lists.slot_of[i];
      const Index row = lists.rows(hidden_rows)[i];
      const T q = gate[s] * scale[e];
      for (Index r = 0; r < rank; ++r) scaled(s, r) = q * hidden(row, r);
    }
  };
  for_each_slot_tile(lists, Slots::active, hidden.cols, context, body);
}

template <class T>
void up(const SlotLists& lists, std::span<const T> gate, std::span<const T> scale,
        MatView<const T> scaled, const Panels<T>& up, std::span<const Index> rank_begin,
        MatView<const T> bias, MatView<T> y, RowsBy y_rows, const Context& context) noexcept {
  const auto block = [&](Index first, Index count) {
    const MatView<const T> panel = up.panel(first / kPanel);
    RowList<T> columns = y;
    columns.data += first;
    for (Index e = 0; e < lists.experts(); ++e) {
      const SlotRange range = slots_of(lists, e, Slots::active);
      if (range.size() == 0) continue;
      columns.index = lists.rows(y_rows).data() + range.begin;
      const MatView<const T> b = panel.row_block(rank_begin[e], rank_begin[e + 1] - rank_begin[e]);
      product(RowList<const T>(pick(scaled, lists.slot_of, range)), range.size(), b, 0, count,
              columns, false, context.isa);
      if (bias.empty()) continue;
      for_each_gate_tile(lists, range, gate, scale[e], [&](MatView<const T> q, SlotRange tile) {
        product<T>(q, tile.size(), bias.row_block(e, 1), first, count,
                   pick(y, lists.rows(y_rows), tile), false, context.isa);
      });
    }
  };
  const Index slots = static_cast<Index>(lists.slot_of.size());
  for_each_block(y.cols, kPanel, slots * scaled.cols, context, block);
}

template <class T>
void dense_forward(MatView<const T> gate, std::span<const T> scale, MatView<const T> x,
                   std::span<const Panels<T>> down, const Panels<T>& up,
                   std::span<const Index> rank_begin, MatView<T> hidden, MatView<T> y,
                   const Context& context) noexcept {
  const auto tile = [&](Index first, Index count) {
    const MatView<const T> rows = x.row_block(first, count);
    for (Index e = 0; e < gate.cols; ++e) {
      const Index rank = rank_begin[e + 1] - rank_begin[e];
      const MatView<T> h = hidden.row_block(first, count).col_block(rank_begin[e], rank);
      panel_product<T>(rows, count, down[e], 0, down[e].count(), h, true, context.isa);
      for (Index t = 0; t < count; ++t) {
        const T q = gate(first + t, e) * scale[e];
        for (Index r = 0; r < rank; ++r) h(t, r) = q * h(t, r);
      }
    }
  };
  for_each_block(x.rows, kSlotTile, x.cols * hidden.cols, context, tile);
  const auto block = [&](Index first, Index) {
    panel_product<T>(MatView<const T>(hidden), x.rows, up, first / kPanel, first / kPanel + 1, y,
                     false, context.isa);
  };
  for_each_block(y.cols, kPanel, x.rows * hidden.cols, context, block);
}

template <class T>
void up_transposed(const SlotLists& lists, std::span<const MatView<const T>> up,
                   MatView<const T> dy, RowsBy y_rows, MatView<T> v,
                   const Context& context) noexcept {
  const auto body = [&](Index e, SlotRange range) {
    product<T>(pick(dy, lists.rows(y_rows), range), range.size(), up[e], 0, up[e].cols,
               pick(v, lists.slot_of, range), true, context.isa);
  };
  for_each_slot_tile(lists, Slots::all, dy.cols * v.cols, context, body);
}

template <class T>
void down_transposed(const SlotLists& lists, MatView<const T> dscaled,
                     std::span<const MatView<const T>> down, MatView<T> dx, RowsBy x_rows,
                     const Context& context) noexcept {
  const auto block = [&](Index first, Index count) {
    for (Index e = 0; e < lists.experts(); ++e) {
      const SlotRange range = slots_of(lists, e, Slots::active);
      product<T>(pick(dscaled, lists.slot_of, range), range.size(), down[e], first, count,
                 pick(dx, lists.rows(x_rows), range), false, context.isa);
    }
  };
  const Index slots = static_cast<Index>(lists.slot_of.size());
  for_each_block(dx.cols, kPanel, slots * dscaled.cols, context, block);
}

/// Columns too few to fill a tile.
inline constexpr Index kNarrow = 16;

/// The same for c of at most kColumnBlock rows and kNarrow columns, with the rows side by side in a
/// tile: the transpose of c is summed in a buffer.
template <class T>
void narrow_outer(RowList<const T> a, RowList<const T> b, Index depth, MatView<T> c,
                  Isa isa) noexcept {
  T buffer[kNarrow * kColumnBlock];
  const MatView<T> sum(buffer, c.cols, c.rows);
  for (Index n = 0; n < c.rows; ++n) {
    for (Index r = 0; r < c.cols; ++r) sum(r, n) = c(n, r);
  }
  outer<T>(b, a, depth, sum, isa);
  for (Index n = 0; n < c.rows; ++n) {
    for (Index r = 0; r < c.cols; ++r) c(n, r) = sum(r, n);
  }
}

template <class T>
void up_gradient(const SlotLists& lists, MatView<const T> dy, RowsBy y_rows,
                 MatView<const T> scaled, std::span<const MatView<T>> dup,
                 const Context& context) noexcept {
  constexpr Index kWorthABuffer = 16;  // slots
  const auto block = [&](Index e, Index first, Index count) {
    const SlotRange range = slots_of(lists, e, Slots::active);
    if (range.size() == 0) return;
    const RowList<const T> a = pick(dy.col_block(first, count), lists.rows(y_rows), range);
    const RowList<const T> b = pick(scaled, lists.slot_of, range);
    const MatView<T> c = dup[e].row_block(first, count);
    if (c.cols <= kNarrow && range.size() >= kWorthABuffer) {
      narrow_outer<T>(a, b, range.size(), c, context.isa);
    } else {
      outer<T>(a, b, range.size(), c, context.isa);
    }
  };
  const Index work = static_cast<Index>(lists.slot_of.size()) * scaled.cols / lists.experts();
  for_each_expert_block(lists.experts(), dy.cols, kColumnBlock, work, context, block);
}

template <class T>
void down_gradient(const SlotLists& lists, MatView<const T> dscaled, MatView<const T> x,
                   RowsBy x_rows, std::span<const MatView<T>> ddown,
                   const Context& context) noexcept {
  const auto block = [&](Index e, Index first, Index count) {
    const SlotRange range = slots_of(lists, e, Slots::active);
    if (range.size() == 0) return;
    const MatView<const T> columns = x.col_block(first, count);
    outer<T>(pick(dscaled, lists.slot_of, range), pick(columns, lists.rows(x_rows), range),
             range.size(), ddown[e].col_block(first, count), context.isa);
  };
  const Index work = static_cast<Index>(lists.slot_of.size()) * dscaled.cols / lists.experts();
  for_each_expert_block(lists.experts(), x.cols, kColumnBlock, work, context, block);
}

template <class T>
void bias_gradient(const SlotLists& lists, std::span<const T> gate, std::span<const T> scale,
                   MatView<const T> dy, RowsBy y_rows, std::span<const MatView<T>> dbias,
                   const Context& context) noexcept {
  const auto block = [&](Index e, Index first, Index count) {
    const SlotRange range = slots_of(lists, e, Slots::active);
    const MatView<const T> columns = dy.col_block(first, count);
    for_each_gate_tile(lists, range, gate, scale[e], [&](MatView<const T> q, SlotRange tile) {
      outer<T>(q, pick(columns, lists.rows(y_rows), tile), tile.size(),
               dbias[e].col_block(first, count), context.isa);
    });
  };
  const Index work = static_cast<Index>(lists.slot_of.size()) / lists.experts();
  for_each_expert_block(lists.experts(), dy.cols, kColumnBlock, work, context, block);
}

template <class T>
void gate_gradient(const SlotLists& lists, std::span<const T> scale,
                   std::span<const Index> rank_begin, MatView<const T> by_slot,
                   MatView<const T> by_row, RowsBy rows, std::span<const MatView<const T>> bias,
                   MatView<const T> dy, RowsBy y_rows, std::span<T> dgate,
                   const Context& context) noexcept {
  const auto body = [&](Index e, SlotRange range) {
    const auto rank = static_cast<std::size_t>(rank_begin[e + 1] - rank_begin[e]);
    T sum[kSlotTile];
    for (Index i = 0; i < range.size(); ++i) {
      const Index row = lists.rows(rows)[range.begin + i];
      const Index s = lists.slot_of[range.begin + i];
      sum[i] = dot<T>(by_slot.row(s).first(rank), by_row.row(row).first(rank));
    }
    if (!bias.empty()) {
      product<T>(pick(dy, lists.rows(y_rows), range), range.size(), {bias[e].data, dy.cols, 1}, 0,
                 1, MatView<T>(sum, range.size(), 1), false, context.isa);
    }
    for (Index i = 0; i < range.size(); ++i) {
      T& gradient = dgate[lists.slot_of[range.begin + i]];
      gradient = std::fma(scale[e], sum[i], gradient);
    }
  };
  const Index work = by_slot.cols + (bias.empty() ? 0 : dy.cols);
  for_each_slot_tile(lists, Slots::all, work, context, body);
}

}  // namespace mole::inline MOLE_ABI::gated

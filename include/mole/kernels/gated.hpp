// SPDX-License-Identifier: Apache-2.0
// Loops over (token, expert) slots. Work is cut by the owner of the output: a slot row belongs to
// one task, a block of columns belongs to one task that visits the experts in ascending order. So
// sums never depend on the workers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/chain_product.hpp"

namespace mole::inline MOLE_ABI {

/// Whose row a matrix holds: one row per token, or one per slot.
enum class RowsBy { token, slot };

/// Slots grouped by expert, ascending by token; the active ones first, the probes after them.
struct SlotLists {
  std::span<const std::int32_t> expert_begin;  ///< [experts + 1], into the lists below
  std::span<const std::int32_t> active_end;    ///< [experts], end of the active slots of an expert
  std::span<const std::int32_t> slot_of;       ///< [slots]
  std::span<const std::int32_t> token_of;      ///< [slots]

  Index experts() const noexcept { return static_cast<Index>(active_end.size()); }
  std::span<const std::int32_t> rows(RowsBy by) const noexcept {
    return by == RowsBy::token ? token_of : slot_of;
  }
};

namespace gated {

/// Positions [begin, end) in the lists.
struct SlotRange {
  Index begin = 0, end = 0;
  Index size() const noexcept { return end - begin; }
};

enum class Slots { active, all };

inline SlotRange slots_of(const SlotLists& lists, Index expert, Slots which) noexcept {
  const bool active = which == Slots::active;
  return {lists.expert_begin[expert],
          active ? lists.active_end[expert] : lists.expert_begin[expert + 1]};
}

/// The rows of a range, as an indexed operand.
template <class T>
RowList<T> pick(MatView<T> view, std::span<const std::int32_t> rows, SlotRange range) noexcept {
  return {view, rows.data() + range.begin};
}

/// Rows of one task of a slot loop, columns of one task of a column loop.
inline constexpr Index kSlotTile = 48;
inline constexpr Index kColumnBlock = 4 * kPanel;

/// Multiply-adds worth a trip to another thread.
inline constexpr Index kGrainWork = 100'000;

inline Index grain_for(Index work) noexcept {
  return std::max<Index>(1, kGrainWork / std::max<Index>(work, 1));
}

/// body(expert, range) over tiles of every expert's list, in parallel. `work`: multiply-adds a
/// slot.
template <class Body>
void for_each_slot_tile(const SlotLists& lists, Slots which, Index work, const Context& context,
                        Body&& body) {
  const auto tiles_of = [&](Index e) {
    return (slots_of(lists, e, which).size() + kSlotTile - 1) / kSlotTile;
  };
  Index tasks = 0;
  for (Index e = 0; e < lists.experts(); ++e) tasks += tiles_of(e);
  const auto run = [&](Index first, Index last, int) {
    Index expert = 0, before = 0;
    for (Index task = first; task < last; ++task) {
      while (before + tiles_of(expert) <= task) before += tiles_of(expert++);
      const SlotRange all = slots_of(lists, expert, which);
      const Index begin = all.begin + (task - before) * kSlotTile;
      body(expert, SlotRange{begin, std::min(begin + kSlotTile, all.end)});
    }
  };
  parallel_for(context, tasks, grain_for(work * kSlotTile), run);
}

/// body(first, count) over blocks of at most `block` of `extent` columns, in parallel. `work`:
/// multiply-adds a column.
template <class Body>
void for_each_block(Index extent, Index block, Index work, const Context& context, Body&& body) {
  const auto run = [&](Index first, Index last, int) {
    for (Index b = first; b < last; ++b) body(b * block, std::min(block, extent - b * block));
  };
  parallel_for(context, (extent + block - 1) / block, grain_for(work * block), run);
}

/// body(expert, first, count) over blocks of the rows or columns of every expert, in parallel: the
/// owner loop of parameter gradients.
template <class Body>
void for_each_expert_block(Index experts, Index extent, Index block, Index work,
                           const Context& context, Body&& body) {
  const Index blocks = (extent + block - 1) / block;
  const auto run = [&](Index first, Index last, int) {
    for (Index i = first; i < last; ++i) {
      const Index begin = i % blocks * block;
      body(i / blocks, begin, std::min(block, extent - begin));
    }
  };
  parallel_for(context, experts * blocks, grain_for(work * block), run);
}

}  // namespace gated

}  // namespace mole::inline MOLE_ABI

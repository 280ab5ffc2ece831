// SPDX-License-Identifier: Apache-2.0
// Routing: who works on which token and how much. The one table between routers and banks.
//
// CSR by token: the slots of token t are [token_begin[t], token_begin[t+1]), ascending by expert,
// at most one slot per (token, expert). A slot whose gate is exactly 0 is a *probe*: skipped in
// forward, but its gate gradient is computed in backward. Inverse lists group the slots by expert,
// ascending by token, active slots first, probes after them.
//
// Goals: any number of experts per token, views only, no allocation after construction.
// Non-goals: editing in place, sparse gradients.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"
#include "mole/kernels/gated.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct Routing {
  Index tokens = 0, experts = 0;
  std::span<const std::int32_t> token_begin;  ///< [tokens + 1]
  std::span<const std::int32_t> expert;       ///< [slots]
  std::span<const T> gate;                    ///< [slots]
  SlotLists lists;                            ///< the same slots grouped by expert

  Index slots() const noexcept { return static_cast<Index>(expert.size()); }

  /// Every token has every expert with a gate that is not 0.
  bool is_dense() const noexcept {
    if (slots() != tokens * experts) return false;
    return std::none_of(gate.begin(), gate.end(), [](T g) { return g == T(0); });
  }
};

/// Fixed-capacity builder of a Routing over caller memory. A cheap value: copies share the memory.
///
///   table.begin(tokens);
///   table.select(t, experts, gates);   // for every token, any order, tokens may run in parallel
///   table.finish();
///   Routing<T> routing = table.view();
template <class T>
class RoutingTable {
 public:
  RoutingTable() = default;

  /// Takes its memory from `memory`. At most `max_per_token` slots a token.
  RoutingTable(Workspace& memory, Index max_tokens, Index experts, Index max_per_token);

  static std::size_t bytes(Index max_tokens, Index experts, Index max_per_token) noexcept;

  /// What the constructor checks. Throws invalid_argument; limit_exceeded from 2^31 slots on.
  static void check_size(Index max_tokens, Index experts, Index max_per_token);

  Index max_tokens() const noexcept { return max_tokens_; }
  Index experts() const noexcept { return experts_; }
  Index max_slots() const noexcept { return saturating_product(max_tokens_, max_per_token_); }
  Index max_per_token() const noexcept { return max_per_token_; }

  /// Throws limit_exceeded above max_tokens; the table is unchanged then.
  void begin(Index tokens);

  /// Slots of one token, experts distinct and in range, in any order. A token not selected has
  /// none. Throws limit_exceeded above max_per_token, invalid_argument on a bad token and a bad or
  /// repeated expert.
  void select(Index token, std::span<const std::int32_t> experts, std::span<const T> gates);

  /// Every expert for one token, with its gates [experts]; zeros become probes.
  void select_all(Index token, std::span<const T> gates);

  /// Compacts the rows and builds the inverse lists; then no more `select` until `begin`. A second
  /// call does nothing.
  void finish() noexcept;

  /// Valid until the next `begin`.
  Routing<T> view() const noexcept { return routing_; }

 private:
  template <class Arena>
  void layout(Arena& arena);
  void check_token(Index token) const {
    require(token >= 0 && token < tokens_, Errc::invalid_argument, "token ", token,
            " is not in 0 ... ", tokens_ - 1);
  }

  Index max_tokens_ = 0, experts_ = 0, max_per_token_ = 0, tokens_ = 0;
  bool finished_ = false;
  std::span<std::int32_t> count_;         // [max_tokens], slots of each token while building
  std::span<std::int32_t> token_begin_;   // [max_tokens + 1]
  std::span<std::int32_t> expert_;        // [max_slots], row t at t * max_per_token until finish
  std::span<T> gate_;                     // [max_slots], likewise
  std::span<std::int32_t> expert_begin_;  // [experts + 1]
  std::span<std::int32_t> active_end_;    // [experts]
  std::span<std::int32_t> slot_of_;       // [max_slots]
  std::span<std::int32_t> token_of_;      // [max_slots]
  Routing<T> routing_;
};

template <class T>
template <class Arena>
void RoutingTable<T>::layout(Arena& arena) {
  count_ = arena.template take<std::int32_t>(max_tokens_);
  token_begin_ = arena.template take<std::int32_t>(max_tokens_ + 1);
  expert_ = arena.template take<std::int32_t>(max_slots());
  gate_ = arena.template take<T>(max_slots());
  expert_begin_ = arena.template take<std::int32_t>(experts_ + 1);
  active_end_ = arena.template take<std::int32_t>(experts_);
  slot_of_ = arena.template take<std::int32_t>(max_slots());
  token_of_ = arena.template take<std::int32_t>(max_slots());
}

template <class T>
RoutingTable<T>::RoutingTable(Workspace& memory, Index max_tokens, Index experts,
                              Index max_per_token)
    : max_tokens_(max_tokens), experts_(experts), max_per_token_(max_per_token) {
  check_size(max_tokens, experts, max_per_token);
  layout(memory);
}

template <class T>
void RoutingTable<T>::check_size(Index max_tokens, Index experts, Index max_per_token) {
  require(max_tokens >= 0 && experts >= 0 && max_per_token >= 0 && max_per_token <= experts,
          Errc::invalid_argument, "routing table: ", max_tokens, " tokens, ", experts,
          " experts, at most ", max_per_token, " experts a token");
  constexpr Index kLimit = std::numeric_limits<std::int32_t>::max();
  require(saturating_product(max_tokens, std::max<Index>(max_per_token, 1)) <= kLimit &&
              experts <= kLimit,
          Errc::limit_exceeded, "routing table: ", max_tokens, " tokens of ", max_per_token,
          " slots and ", experts, " experts, the limit is ", kLimit, " slots or experts");
}

template <class T>
std::size_t RoutingTable<T>::bytes(Index max_tokens, Index experts, Index max_per_token) noexcept {
  RoutingTable table;
  table.max_tokens_ = max_tokens;
  table.experts_ = experts;
  table.max_per_token_ = max_per_token;
  ByteCounter counter;
  table.layout(counter);
  return counter.bytes();
}

template <class T>
void RoutingTable<T>::begin(Index tokens) {
  require(tokens >= 0 && tokens <= max_tokens_, Errc::limit_exceeded, "routing table: ", tokens,
          " tokens, it was made for at most ", max_tokens_);
  tokens_ = tokens;
  finished_ = false;
  std::fill_n(count_.begin(), tokens, 0);
}

template <class T>
void RoutingTable<T>::select(Index token, std::span<const std::int32_t> experts,
                             std::span<const T> gates) {
  const auto slots = static_cast<Index>(experts.size());
  check_token(token);
  count_[token] = 0;
  require(slots == static_cast<Index>(gates.size()), Errc::shape_mismatch, "token ", token, ": ",
          slots, " experts but ", gates.size(), " gates");
  require(slots <= max_per_token_, Errc::limit_exceeded, "token ", token, ": ", slots,
          " experts, the table holds at most ", max_per_token_, " a token");
  std::int32_t* ids = expert_.data() + token * max_per_token_;
  T* row = gate_.data() + token * max_per_token_;
  for (Index i = 0; i < slots; ++i) {
    const std::int32_t id = experts[i];
    require(id >= 0 && id < experts_, Errc::invalid_argument, "token ", token, ": expert ", id,
            " is not in 0 ... ", experts_ - 1);
    Index at = i;
    for (; at > 0 && ids[at - 1] >= id; --at) {
      require(ids[at - 1] != id, Errc::invalid_argument, "token ", token, ": expert ", id,
              " is selected twice");
      ids[at] = ids[at - 1];
      row[at] = row[at - 1];
    }
    ids[at] = id;
    row[at] = gates[i];
  }
  count_[token] = static_cast<std::int32_t>(slots);
}

template <class T>
void RoutingTable<T>::select_all(Index token, std::span<const T> gates) {
  check_token(token);
  require(static_cast<Index>(gates.size()) == experts_ && experts_ == max_per_token_,
          Errc::shape_mismatch, "token ", token, ": ", gates.size(), " gates for ", experts_,
          " experts, ", max_per_token_, " allowed");
  for (Index e = 0; e < experts_; ++e) {
    expert_[token * experts_ + e] = static_cast<std::int32_t>(e);
    gate_[token * experts_ + e] = gates[e];
  }
  count_[token] = static_cast<std::int32_t>(experts_);
}

template <class T>
void RoutingTable<T>::finish() noexcept {
  if (finished_) return;
  finished_ = true;
  std::int32_t slots = 0;
  std::fill(expert_begin_.begin(), expert_begin_.end(), 0);
  std::fill(active_end_.begin(), active_end_.end(), 0);
  for (Index t = 0; t < tokens_; ++t) {
    token_begin_[t] = slots;
    const Index from = t * max_per_token_;
    for (std::int32_t i = 0; i < count_[t]; ++i, ++slots) {
      expert_[slots] = expert_[from + i];
      gate_[slots] = gate_[from + i];
      ++expert_begin_[expert_[slots] + 1];
      active_end_[expert_[slots]] += gate_[slots] != T(0);
    }
  }
  token_begin_[tokens_] = slots;
  for (Index e = 0; e < experts_; ++e) {
    active_end_[e] += expert_begin_[e];  // where the probes of e start
    expert_begin_[e + 1] += expert_begin_[e];
  }
  // Fill both parts of every list front to back; the cursors end at the ends of the parts.
  const auto place = [&](bool active, std::span<std::int32_t> cursor) {
    for (Index t = 0; t < tokens_; ++t) {
      for (std::int32_t s = token_begin_[t]; s < token_begin_[t + 1]; ++s) {
        if ((gate_[s] != T(0)) != active) continue;
        const std::int32_t at = cursor[expert_[s]]++;
        slot_of_[at] = s;
        token_of_[at] = static_cast<std::int32_t>(t);
      }
    }
  };
  place(false, active_end_);
  for (Index e = 0; e < experts_; ++e) active_end_[e] = expert_begin_[e];
  place(true, active_end_);
  const auto n = static_cast<std::size_t>(slots);
  routing_.tokens = tokens_;
  routing_.experts = experts_;
  routing_.token_begin = token_begin_.first(static_cast<std::size_t>(tokens_ + 1));
  routing_.expert = expert_.first(n);
  routing_.gate = gate_.first(n);
  routing_.lists = {expert_begin_, active_end_, slot_of_.first(n), token_of_.first(n)};
}

#ifndef MOLE_HEADER_ONLY
extern template class RoutingTable<float>;
extern template class RoutingTable<double>;
#endif

}  // namespace mole::inline MOLE_ABI

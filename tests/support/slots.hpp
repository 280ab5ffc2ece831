// SPDX-License-Identifier: Apache-2.0
// Routings for tests, written as lists of (expert, gate) per token.
#pragma once

#include <cstdint>
#include <vector>

#include "mole/core/random.hpp"
#include "mole/core/workspace.hpp"
#include "mole/routing/routing.hpp"

namespace test {

using mole::Index;

struct Slot {
  std::int32_t expert = 0;
  double gate = 0;
};

/// slots[t]: those of token t.
using Slots = std::vector<std::vector<Slot>>;

/// A Routing that owns its memory.
template <class T>
class OwnedRouting {
 public:
  OwnedRouting(const Slots& slots, Index experts)
      : memory_(mole::RoutingTable<T>::bytes(static_cast<Index>(slots.size()), experts, experts)) {
    mole::Workspace workspace(memory_.span());
    mole::RoutingTable<T> table(workspace, static_cast<Index>(slots.size()), experts, experts);
    table.begin(static_cast<Index>(slots.size()));
    for (std::size_t t = 0; t < slots.size(); ++t) {
      std::vector<std::int32_t> expert;
      std::vector<T> gate;
      for (const Slot& slot : slots[t]) {
        expert.push_back(slot.expert);
        gate.push_back(static_cast<T>(slot.gate));
      }
      table.select(static_cast<Index>(t), expert, gate);
    }
    table.finish();
    routing_ = table.view();
  }

  const mole::Routing<T>& operator*() const { return routing_; }
  const mole::Routing<T>* operator->() const { return &routing_; }

 private:
  mole::Buffer memory_;
  mole::Routing<T> routing_;
};

/// Every token draws each expert with probability `share`; some slots are probes; every seventh
/// token has no slot; expert 1, if there are more than two, never has one.
inline Slots random_slots(Index tokens, Index experts, double share, std::uint64_t seed) {
  const mole::Random random(seed, 23);
  Slots slots(static_cast<std::size_t>(tokens));
  for (Index t = 0; t < tokens; ++t) {
    for (Index e = 0; e < experts; ++e) {
      const auto n = static_cast<std::uint64_t>(2 * (t * experts + e));
      if (t % 7 == 5 || (e == 1 && experts > 2) || random.uniform(n) >= share) continue;
      const double gate = (static_cast<double>(random.below(n + 1, 64)) - 24) / 32;
      slots[static_cast<std::size_t>(t)].push_back({static_cast<std::int32_t>(e), gate});
    }
  }
  return slots;
}

/// Every token has every expert with a gate that is not 0.
inline Slots dense_slots(Index tokens, Index experts) {
  Slots slots(static_cast<std::size_t>(tokens));
  for (Index t = 0; t < tokens; ++t) {
    for (Index e = 0; e < experts; ++e) {
      const double gate = static_cast<double>((5 * t + 3 * e) % 11 + 1) / 8;
      slots[static_cast<std::size_t>(t)].push_back(
          {static_cast<std::int32_t>(e), e % 2 == 0 ? gate : -gate});
    }
  }
  return slots;
}

}  // namespace test

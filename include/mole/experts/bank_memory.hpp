// SPDX-License-Identifier: Apache-2.0
// BankMemory: how large the pieces of a bank are, and the pieces, from one layout each.
//
// A bank that derives from it has public layouts, functions of an arena, which is a Workspace that
// hands out the pieces or a ByteCounter that adds them up:
//
//   Params<V> take_params<V>(arena)
//   Prepared take_prepared(arena)
//   Tape take_tape(arena, max_tokens, max_slots)
//
// The scratch of a call stays with the bank: it is laid out anew by every call.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/workspace.hpp"

namespace mole::inline MOLE_ABI {

template <class Bank>
class BankMemory {
 public:
  /// Uninitialised parameters of type V (weights, gradients, moments) in the caller's memory.
  template <class V>
  auto make_params(Workspace& memory) const {
    return bank().template take_params<V>(memory);
  }
  template <class V>
  std::size_t params_bytes() const noexcept {
    ByteCounter counter;
    bank().template take_params<V>(counter);
    return counter.bytes();
  }

  std::size_t prepared_bytes() const noexcept {
    ByteCounter counter;
    bank().take_prepared(counter);
    return counter.bytes();
  }

  /// What forward records for backward of up to so many tokens and slots.
  auto make_tape(Workspace& memory, Index max_tokens, Index max_slots) const {
    return bank().take_tape(memory, max_tokens, max_slots);
  }
  std::size_t tape_bytes(Index max_tokens, Index max_slots) const noexcept {
    ByteCounter counter;
    bank().take_tape(counter, max_tokens, max_slots);
    return counter.bytes();
  }

 private:
  friend Bank;
  BankMemory() = default;
  const Bank& bank() const noexcept { return static_cast<const Bank&>(*this); }
};

}  // namespace mole::inline MOLE_ABI

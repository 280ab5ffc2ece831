// SPDX-License-Identifier: Apache-2.0
// Header-only build: one level, whatever the compiler was allowed to use.
#pragma once

#include "mole/core/context.hpp"

namespace mole::inline MOLE_ABI {

inline Isa best_isa() noexcept {
  return Isa::portable;
}
inline bool isa_available(Isa isa) noexcept {
  return isa == Isa::portable;
}

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// The version of the library. The build reads it from here.
#pragma once

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {

inline constexpr int kVersionMajor = 0;
inline constexpr int kVersionMinor = 1;
inline constexpr int kVersionPatch = 0;

}  // namespace mole::inline MOLE_ABI

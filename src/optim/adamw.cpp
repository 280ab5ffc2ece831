// SPDX-License-Identifier: Apache-2.0
#include "mole/optim/adamw.hpp"

namespace mole::inline MOLE_ABI {
template struct AdamWUpdate<float>;
template struct AdamWUpdate<double>;
}  // namespace mole::inline MOLE_ABI

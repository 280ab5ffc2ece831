// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/soft_slots.hpp"

namespace mole::inline MOLE_ABI {
template struct SoftSlots<float>;
template struct SoftSlots<double>;
}  // namespace mole::inline MOLE_ABI

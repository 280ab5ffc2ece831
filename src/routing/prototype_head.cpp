// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/prototype_head.hpp"

namespace mole::inline MOLE_ABI {
template struct PrototypeHead<float>;
template struct PrototypeHead<double>;
}  // namespace mole::inline MOLE_ABI

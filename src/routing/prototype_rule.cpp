// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/prototype_rule.hpp"

namespace mole::inline MOLE_ABI {
template struct PrototypeRule<float>;
template struct PrototypeRule<double>;
}  // namespace mole::inline MOLE_ABI

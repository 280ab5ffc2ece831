// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/hash_rule.hpp"

namespace mole::inline MOLE_ABI {
template struct HashRule<float>;
template struct HashRule<double>;
}  // namespace mole::inline MOLE_ABI

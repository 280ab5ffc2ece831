// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/top_k_rule.hpp"

namespace mole::inline MOLE_ABI {
template struct TopKRule<float>;
template struct TopKRule<double>;
}  // namespace mole::inline MOLE_ABI

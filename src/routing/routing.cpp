// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {
template class RoutingTable<float>;
template class RoutingTable<double>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/unit.hpp"

namespace mole::inline MOLE_ABI {
template class UnitRouter<float>;
template class UnitRouter<double>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/uncertainty.hpp"

namespace mole::inline MOLE_ABI {
template class UncertaintyRouter<float>;
template class UncertaintyRouter<double>;
}  // namespace mole::inline MOLE_ABI

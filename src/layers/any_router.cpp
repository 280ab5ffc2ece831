// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/any_router.hpp"

namespace mole::inline MOLE_ABI {
template class AnyRouter<float>;
template class AnyRouter<double>;
}  // namespace mole::inline MOLE_ABI

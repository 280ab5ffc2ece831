// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/given.hpp"

namespace mole::inline MOLE_ABI {
template class GivenRouter<float>;
template class GivenRouter<double>;
}  // namespace mole::inline MOLE_ABI

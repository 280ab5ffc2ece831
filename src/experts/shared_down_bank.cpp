// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/shared_down_bank.hpp"

namespace mole::inline MOLE_ABI {
template class SharedDownBank<float>;
template class SharedDownBank<double>;
}  // namespace mole::inline MOLE_ABI

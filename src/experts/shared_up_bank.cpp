// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/shared_up_bank.hpp"

namespace mole::inline MOLE_ABI {
template class SharedUpBank<float>;
template class SharedUpBank<double>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/modulated_bank.hpp"

namespace mole::inline MOLE_ABI {
template class ModulatedBank<float>;
template class ModulatedBank<double>;
}  // namespace mole::inline MOLE_ABI

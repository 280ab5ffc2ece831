// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/linear_bank.hpp"

namespace mole::inline MOLE_ABI {
template class LinearBank<float>;
template class LinearBank<double>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/ffn_bank.hpp"

namespace mole::inline MOLE_ABI {
template class FfnBank<float>;
template class FfnBank<double>;
}  // namespace mole::inline MOLE_ABI

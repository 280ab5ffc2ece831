// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/recurrent_cell.hpp"

namespace mole::inline MOLE_ABI {
template struct RecurrentCell<float>;
template struct RecurrentCell<double>;
}  // namespace mole::inline MOLE_ABI

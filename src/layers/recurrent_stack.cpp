// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/recurrent_stack.hpp"

namespace mole::inline MOLE_ABI {
template class RecurrentStack<float>;
template class RecurrentStack<double>;
}  // namespace mole::inline MOLE_ABI

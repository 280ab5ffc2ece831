// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/dmoerm.hpp"

namespace mole::inline MOLE_ABI {
template class Dmoerm<float>;
template class Dmoerm<double>;
}  // namespace mole::inline MOLE_ABI

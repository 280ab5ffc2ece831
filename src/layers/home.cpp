// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/home.hpp"

namespace mole::inline MOLE_ABI {
template class Home<float>;
template class Home<double>;
}  // namespace mole::inline MOLE_ABI

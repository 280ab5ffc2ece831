// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/switch.hpp"

namespace mole::inline MOLE_ABI {
template struct SwitchRule<float>;
template struct SwitchRule<double>;
template class HeadRouter<float, LinearHead<float>, SwitchRule<float>>;
template class HeadRouter<double, LinearHead<double>, SwitchRule<double>>;
}  // namespace mole::inline MOLE_ABI

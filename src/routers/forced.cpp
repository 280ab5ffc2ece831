// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/forced.hpp"

namespace mole::inline MOLE_ABI {
template struct ForcedRule<float>;
template struct ForcedRule<double>;
template class HeadRouter<float, NoHead<float>, ForcedRule<float>>;
template class HeadRouter<double, NoHead<double>, ForcedRule<double>>;
}  // namespace mole::inline MOLE_ABI

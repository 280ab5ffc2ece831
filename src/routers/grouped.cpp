// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/grouped.hpp"

namespace mole::inline MOLE_ABI {
template struct GroupedRule<float>;
template struct GroupedRule<double>;
template class HeadRouter<float, LinearHead<float>, GroupedRule<float>>;
template class HeadRouter<double, LinearHead<double>, GroupedRule<double>>;
}  // namespace mole::inline MOLE_ABI

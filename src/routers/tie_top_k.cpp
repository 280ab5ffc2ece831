// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/tie_top_k.hpp"

namespace mole::inline MOLE_ABI {
template struct TieTopKRule<float>;
template struct TieTopKRule<double>;
template class HeadRouter<float, LinearHead<float>, TieTopKRule<float>>;
template class HeadRouter<double, LinearHead<double>, TieTopKRule<double>>;
}  // namespace mole::inline MOLE_ABI

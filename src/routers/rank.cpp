// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/rank.hpp"

namespace mole::inline MOLE_ABI {
template struct RankRule<float>;
template struct RankRule<double>;
template class HeadRouter<float, LinearHead<float>, RankRule<float>>;
template class HeadRouter<double, LinearHead<double>, RankRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/gshard.hpp"

namespace mole::inline MOLE_ABI {
template struct GShardRule<float>;
template struct GShardRule<double>;
template class HeadRouter<float, LinearHead<float>, GShardRule<float>>;
template class HeadRouter<double, LinearHead<double>, GShardRule<double>>;
}  // namespace mole::inline MOLE_ABI

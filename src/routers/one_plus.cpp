// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/one_plus.hpp"

namespace mole::inline MOLE_ABI {
template struct OnePlusRule<float>;
template struct OnePlusRule<double>;
template class HeadRouter<float, LinearHead<float>, OnePlusRule<float>>;
template class HeadRouter<double, LinearHead<double>, OnePlusRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/straight_through.hpp"

namespace mole::inline MOLE_ABI {
template struct StraightThroughRule<float>;
template struct StraightThroughRule<double>;
template class HeadRouter<float, LinearHead<float>, StraightThroughRule<float>>;
template class HeadRouter<double, LinearHead<double>, StraightThroughRule<double>>;
}  // namespace mole::inline MOLE_ABI

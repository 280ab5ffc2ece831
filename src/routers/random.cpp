// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/random.hpp"

namespace mole::inline MOLE_ABI {
template struct RandomRule<float>;
template struct RandomRule<double>;
template class HeadRouter<float, NoHead<float>, RandomRule<float>>;
template class HeadRouter<double, NoHead<double>, RandomRule<double>>;
}  // namespace mole::inline MOLE_ABI

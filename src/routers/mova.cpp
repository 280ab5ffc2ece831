// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/mova.hpp"

namespace mole::inline MOLE_ABI {
template struct MovaHead<float>;
template struct MovaHead<double>;
template class HeadRouter<float, MovaHead<float>, TopKRule<float>>;
template class HeadRouter<double, MovaHead<double>, TopKRule<double>>;
}  // namespace mole::inline MOLE_ABI

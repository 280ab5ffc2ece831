// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/base.hpp"

namespace mole::inline MOLE_ABI {
template struct BaseRule<float>;
template struct BaseRule<double>;
template class HeadRouter<float, LinearHead<float>, BaseRule<float>>;
template class HeadRouter<double, LinearHead<double>, BaseRule<double>>;
}  // namespace mole::inline MOLE_ABI

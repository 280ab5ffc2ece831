// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/relu.hpp"

namespace mole::inline MOLE_ABI {
template struct ReluRule<float>;
template struct ReluRule<double>;
template class HeadRouter<float, LinearHead<float>, ReluRule<float>>;
template class HeadRouter<double, LinearHead<double>, ReluRule<double>>;
}  // namespace mole::inline MOLE_ABI

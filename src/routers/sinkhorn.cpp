// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/sinkhorn.hpp"

namespace mole::inline MOLE_ABI {
template struct SinkhornRule<float>;
template struct SinkhornRule<double>;
template class HeadRouter<float, LinearHead<float>, SinkhornRule<float>>;
template class HeadRouter<double, LinearHead<double>, SinkhornRule<double>>;
}  // namespace mole::inline MOLE_ABI

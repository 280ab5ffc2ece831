// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/near_best.hpp"

namespace mole::inline MOLE_ABI {
template struct NearBestRule<float>;
template struct NearBestRule<double>;
template class HeadRouter<float, LinearHead<float>, NearBestRule<float>>;
template class HeadRouter<double, LinearHead<double>, NearBestRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/pathway.hpp"

namespace mole::inline MOLE_ABI {
template struct PathwayHead<float>;
template struct PathwayHead<double>;
template struct PathwayRule<float>;
template struct PathwayRule<double>;
template class HeadRouter<float, PathwayHead<float>, PathwayRule<float>>;
template class HeadRouter<double, PathwayHead<double>, PathwayRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/sigmoid.hpp"

namespace mole::inline MOLE_ABI {
template struct SigmoidRule<float>;
template struct SigmoidRule<double>;
template class HeadRouter<float, LinearHead<float>, SigmoidRule<float>>;
template class HeadRouter<double, LinearHead<double>, SigmoidRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/threshold.hpp"

namespace mole::inline MOLE_ABI {
template struct ThresholdRule<float>;
template struct ThresholdRule<double>;
template class HeadRouter<float, LinearHead<float>, ThresholdRule<float>>;
template class HeadRouter<double, LinearHead<double>, ThresholdRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/learned_threshold.hpp"

namespace mole::inline MOLE_ABI {
template struct LearnedThresholdRule<float>;
template struct LearnedThresholdRule<double>;
template class HeadRouter<float, LinearPairHead<float>, LearnedThresholdRule<float>>;
template class HeadRouter<double, LinearPairHead<double>, LearnedThresholdRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/noisy_top_k.hpp"

namespace mole::inline MOLE_ABI {
template struct NoisyTopKRule<float>;
template struct NoisyTopKRule<double>;
template class HeadRouter<float, LinearPairHead<float>, NoisyTopKRule<float>>;
template class HeadRouter<double, LinearPairHead<double>, NoisyTopKRule<double>>;
}  // namespace mole::inline MOLE_ABI

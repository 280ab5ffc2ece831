// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/hard_top_k.hpp"

namespace mole::inline MOLE_ABI {
template struct HardTopKRule<float>;
template struct HardTopKRule<double>;
template struct StraightThroughRule<float>;
template struct StraightThroughRule<double>;
template struct OnePlusRule<float>;
template struct OnePlusRule<double>;
template class HeadRouter<float, LinearHead<float>, HardTopKRule<float>>;
template class HeadRouter<double, LinearHead<double>, HardTopKRule<double>>;
template class HeadRouter<float, LinearHead<float>, StraightThroughRule<float>>;
template class HeadRouter<double, LinearHead<double>, StraightThroughRule<double>>;
template class HeadRouter<float, LinearHead<float>, OnePlusRule<float>>;
template class HeadRouter<double, LinearHead<double>, OnePlusRule<double>>;
}  // namespace mole::inline MOLE_ABI

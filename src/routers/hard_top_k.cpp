// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/hard_top_k.hpp"

namespace mole::inline MOLE_ABI {
template struct HardTopKRule<float>;
template struct HardTopKRule<double>;
template class HeadRouter<float, LinearHead<float>, HardTopKRule<float>>;
template class HeadRouter<double, LinearHead<double>, HardTopKRule<double>>;
}  // namespace mole::inline MOLE_ABI

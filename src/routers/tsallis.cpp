// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/tsallis.hpp"

namespace mole::inline MOLE_ABI {
template struct TsallisRule<float>;
template struct TsallisRule<double>;
template class HeadRouter<float, LinearHead<float>, TsallisRule<float>>;
template class HeadRouter<double, LinearHead<double>, TsallisRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/deepseek.hpp"

namespace mole::inline MOLE_ABI {
template struct DeepSeekRule<float>;
template struct DeepSeekRule<double>;
template class HeadRouter<float, LinearHead<float>, DeepSeekRule<float>>;
template class HeadRouter<double, LinearHead<double>, DeepSeekRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/gru.hpp"

namespace mole::inline MOLE_ABI {
template struct GruHead<float>;
template struct GruHead<double>;
template class HeadRouter<float, GruHead<float>, TopKRule<float>>;
template class HeadRouter<double, GruHead<double>, TopKRule<double>>;
}  // namespace mole::inline MOLE_ABI

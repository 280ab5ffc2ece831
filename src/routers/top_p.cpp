// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/top_p.hpp"

namespace mole::inline MOLE_ABI {
template struct TopPRule<float>;
template struct TopPRule<double>;
template class HeadRouter<float, LinearHead<float>, TopPRule<float>>;
template class HeadRouter<double, LinearHead<double>, TopPRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/top_any.hpp"

namespace mole::inline MOLE_ABI {
template struct TopAnyHead<float>;
template struct TopAnyHead<double>;
template struct TopAnyRule<float>;
template struct TopAnyRule<double>;
template class HeadRouter<float, TopAnyHead<float>, TopAnyRule<float>>;
template class HeadRouter<double, TopAnyHead<double>, TopAnyRule<double>>;
}  // namespace mole::inline MOLE_ABI

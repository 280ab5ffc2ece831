// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/hash.hpp"

namespace mole::inline MOLE_ABI {
template class HeadRouter<float, NoHead<float>, HashRule<float>>;
template class HeadRouter<double, NoHead<double>, HashRule<double>>;
}  // namespace mole::inline MOLE_ABI

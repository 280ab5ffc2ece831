// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/scored_hash.hpp"

namespace mole::inline MOLE_ABI {
template class HeadRouter<float, LinearHead<float>, HashRule<float>>;
template class HeadRouter<double, LinearHead<double>, HashRule<double>>;
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/one_plus_by_id.hpp"

namespace mole::inline MOLE_ABI {
template class HeadRouter<float, ByIdHead<float>, OnePlusRule<float>>;
template class HeadRouter<double, ByIdHead<double>, OnePlusRule<double>>;
}  // namespace mole::inline MOLE_ABI

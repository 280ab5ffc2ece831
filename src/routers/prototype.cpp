// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/prototype.hpp"

namespace mole::inline MOLE_ABI {
template class HeadRouter<float, PrototypeHead<float>, PrototypeRule<float>>;
template class HeadRouter<double, PrototypeHead<double>, PrototypeRule<double>>;
}  // namespace mole::inline MOLE_ABI

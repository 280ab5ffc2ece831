// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/prototype_choice.hpp"

namespace mole::inline MOLE_ABI {
template struct PrototypeChoiceRule<float>;
template struct PrototypeChoiceRule<double>;
template class HeadRouter<float, PrototypeHead<float>, PrototypeChoiceRule<float>>;
template class HeadRouter<double, PrototypeHead<double>, PrototypeChoiceRule<double>>;
}  // namespace mole::inline MOLE_ABI

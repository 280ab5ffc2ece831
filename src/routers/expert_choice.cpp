// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/expert_choice.hpp"

namespace mole::inline MOLE_ABI {
template struct ExpertChoiceRule<float>;
template struct ExpertChoiceRule<double>;
template class HeadRouter<float, LinearHead<float>, ExpertChoiceRule<float>>;
template class HeadRouter<double, LinearHead<double>, ExpertChoiceRule<double>>;
}  // namespace mole::inline MOLE_ABI

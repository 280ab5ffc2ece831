// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/choice_balance.hpp"

namespace mole::inline MOLE_ABI {
template float choice_balance_loss(const ChoiceBalance<float>&, MatView<const float>,
                                   MatView<float>, const Context&, const TokenMask&);
template double choice_balance_loss(const ChoiceBalance<double>&, MatView<const double>,
                                    MatView<double>, const Context&, const TokenMask&);
}  // namespace mole::inline MOLE_ABI

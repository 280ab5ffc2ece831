// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/excess_balance.hpp"

namespace mole::inline MOLE_ABI {
template float excess_balance_loss(float, const Routing<float>&, MatView<float>, const Context&,
                                   const TokenMask&);
template double excess_balance_loss(double, const Routing<double>&, MatView<double>, const Context&,
                                    const TokenMask&);
}  // namespace mole::inline MOLE_ABI

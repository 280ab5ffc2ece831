// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/balance.hpp"

namespace mole::inline MOLE_ABI {
template float balance_loss(const BalanceLoss<float>&, const Routing<float>&, MatView<const float>,
                            MatView<float>, const Context&);
template double balance_loss(const BalanceLoss<double>&, const Routing<double>&,
                             MatView<const double>, MatView<double>, const Context&);
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/balance.hpp"

namespace mole::inline MOLE_ABI {
template float balance_loss(const BalanceLoss<float>&, std::span<const BalancedLayer<float>>,
                            const Context&);
template double balance_loss(const BalanceLoss<double>&, std::span<const BalancedLayer<double>>,
                             const Context&);
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/device_balance.hpp"

namespace mole::inline MOLE_ABI {
template DeviceBalanceValue device_balance_loss(const DeviceBalance<float>&, const Routing<float>&,
                                                MatView<const float>, MatView<float>,
                                                const Context&, const TokenMask&);
template DeviceBalanceValue device_balance_loss(const DeviceBalance<double>&,
                                                const Routing<double>&, MatView<const double>,
                                                MatView<double>, const Context&, const TokenMask&);
}  // namespace mole::inline MOLE_ABI

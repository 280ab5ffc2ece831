// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/soft_balance.hpp"

namespace mole::inline MOLE_ABI {
template float soft_balance_loss<float>(float, std::span<const SoftBalancedLayer<float>>,
                                        const Context&, const TokenMask&, double);
template double soft_balance_loss<double>(double, std::span<const SoftBalancedLayer<double>>,
                                          const Context&, const TokenMask&, double);
template float square_usage_loss(float, MatView<const float>, MatView<float>, const Context&,
                                 const TokenMask&);
template double square_usage_loss(double, MatView<const double>, MatView<double>, const Context&,
                                  const TokenMask&);
}  // namespace mole::inline MOLE_ABI

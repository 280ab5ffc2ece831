// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/shifted_balance.hpp"

namespace mole::inline MOLE_ABI {
template float shifted_balance_loss(float, MatView<const float>, std::span<const float>,
                                    MatView<float>, std::span<float>, const Context&,
                                    const TokenMask&);
template double shifted_balance_loss(double, MatView<const double>, std::span<const double>,
                                     MatView<double>, std::span<double>, const Context&,
                                     const TokenMask&);
}  // namespace mole::inline MOLE_ABI

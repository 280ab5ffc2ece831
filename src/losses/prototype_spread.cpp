// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/prototype_spread.hpp"

namespace mole::inline MOLE_ABI {
template float diversity_loss(const DiversityLoss&, MatView<const float>, MatView<float>,
                              const Context&, const TokenMask&);
template double diversity_loss(const DiversityLoss&, MatView<const double>, MatView<double>,
                               const Context&, const TokenMask&);
template float simplicity_loss(float, MatView<const float>, MatView<float>, const Context&,
                               const TokenMask&);
template double simplicity_loss(double, MatView<const double>, MatView<double>, const Context&,
                                const TokenMask&);
}  // namespace mole::inline MOLE_ABI

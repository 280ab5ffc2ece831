// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/importance.hpp"

namespace mole::inline MOLE_ABI {
template float importance_loss(const CvSquared&, MatView<const float>, MatView<float>,
                               const Context&, const TokenMask&, bool);
template double importance_loss(const CvSquared&, MatView<const double>, MatView<double>,
                                const Context&, const TokenMask&, bool);
template float localised_balance_loss(const LocalisedBalance<float>&, MatView<const float>,
                                      MatView<float>, const Context&, const TokenMask&);
template double localised_balance_loss(const LocalisedBalance<double>&, MatView<const double>,
                                       MatView<double>, const Context&, const TokenMask&);
}  // namespace mole::inline MOLE_ABI

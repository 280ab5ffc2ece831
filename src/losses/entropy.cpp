// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/entropy.hpp"

namespace mole::inline MOLE_ABI {
template float entropy_loss(const EntropyLoss<float>&, MatView<const float>, MatView<float>,
                            const Context&, const TokenMask&);
template double entropy_loss(const EntropyLoss<double>&, MatView<const double>, MatView<double>,
                             const Context&, const TokenMask&);
template float mutual_information_loss<float>(float, MatView<const float>, MatView<float>,
                                              const Context&, const TokenMask&);
template double mutual_information_loss<double>(double, MatView<const double>, MatView<double>,
                                                const Context&, const TokenMask&);
}  // namespace mole::inline MOLE_ABI

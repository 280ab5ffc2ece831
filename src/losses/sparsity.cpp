// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/sparsity.hpp"

namespace mole::inline MOLE_ABI {
template float sparsity_loss(const SparsityLoss<float>&, MatView<const float>, MatView<float>,
                             const Context&, const TokenMask&);
template double sparsity_loss(const SparsityLoss<double>&, MatView<const double>, MatView<double>,
                              const Context&, const TokenMask&);
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/z_loss.hpp"

namespace mole::inline MOLE_ABI {
template float z_loss(float, MatView<const float>, MatView<float>, const TokenMask&);
template double z_loss(double, MatView<const double>, MatView<double>, const TokenMask&);
}  // namespace mole::inline MOLE_ABI

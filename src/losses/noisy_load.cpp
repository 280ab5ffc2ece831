// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/noisy_load.hpp"

namespace mole::inline MOLE_ABI {
template float noisy_load_loss(const NoisyLoad<float>&, MatView<const float>, MatView<const float>,
                               MatView<const float>, std::span<double>, MatView<float>,
                               MatView<float>, const Context&);
template double noisy_load_loss(const NoisyLoad<double>&, MatView<const double>,
                                MatView<const double>, MatView<const double>, std::span<double>,
                                MatView<double>, MatView<double>, const Context&);
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/entropy.hpp"

namespace mole::inline MOLE_ABI::stages {
template float entropy(const Entropy<float>&, std::span<const float>) noexcept;
template double entropy(const Entropy<double>&, std::span<const double>) noexcept;
template void entropy_backward(const Entropy<float>&, std::span<const float>, float,
                               std::span<float>) noexcept;
template void entropy_backward(const Entropy<double>&, std::span<const double>, double,
                               std::span<double>) noexcept;
}  // namespace mole::inline MOLE_ABI::stages

// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/norm.hpp"

namespace mole::inline MOLE_ABI::norm {
template float standardise(std::span<const float>, double, bool, std::span<float>) noexcept;
template double standardise(std::span<const double>, double, bool, std::span<double>) noexcept;
template void standardise_backward(std::span<const float>, std::span<const float>, float, bool,
                                   std::span<float>) noexcept;
template void standardise_backward(std::span<const double>, std::span<const double>, double, bool,
                                   std::span<double>) noexcept;
}  // namespace mole::inline MOLE_ABI::norm

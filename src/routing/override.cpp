// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/override.hpp"

namespace mole::inline MOLE_ABI::stages {
template bool is_allowed(const Overrides<float>&, Index, Index) noexcept;
template bool is_allowed(const Overrides<double>&, Index, Index) noexcept;
template void override_logits(const Overrides<float>&, Index, std::span<float>) noexcept;
template void override_logits(const Overrides<double>&, Index, std::span<double>) noexcept;
template void override_logits_backward(std::span<const float>, std::span<float>) noexcept;
template void override_logits_backward(std::span<const double>, std::span<double>) noexcept;
}  // namespace mole::inline MOLE_ABI::stages

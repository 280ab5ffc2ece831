// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/weight.hpp"

namespace mole::inline MOLE_ABI::stages {
template void weigh(const Weighting<float>&, std::span<const float>, std::span<const float>,
                    std::span<const std::int32_t>, std::span<float>) noexcept;
template void weigh(const Weighting<double>&, std::span<const double>, std::span<const double>,
                    std::span<const std::int32_t>, std::span<double>) noexcept;
template void weigh_backward(const Weighting<float>&, std::span<const float>,
                             std::span<const float>, std::span<const std::int32_t>,
                             std::span<const float>, std::span<float>, std::span<float>,
                             std::span<float>) noexcept;
template void weigh_backward(const Weighting<double>&, std::span<const double>,
                             std::span<const double>, std::span<const std::int32_t>,
                             std::span<const double>, std::span<double>, std::span<double>,
                             std::span<double>) noexcept;
template void shares_backward(std::span<const std::int32_t>, std::span<const float>,
                              std::span<const float>, float, std::span<float>) noexcept;
template void shares_backward(std::span<const std::int32_t>, std::span<const double>,
                              std::span<const double>, double, std::span<double>) noexcept;
}  // namespace mole::inline MOLE_ABI::stages

// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/select.hpp"

namespace mole::inline MOLE_ABI::stages {
template void selection_key(std::span<const float>, std::span<const float>, std::span<const float>,
                            std::span<float>) noexcept;
template void selection_key(std::span<const double>, std::span<const double>,
                            std::span<const double>, std::span<double>) noexcept;
template Index select_top_k(std::span<const float>, std::span<std::int32_t>) noexcept;
template Index select_top_k(std::span<const double>, std::span<std::int32_t>) noexcept;
template Index sort_keys(std::span<const float>, std::span<std::int32_t>) noexcept;
template Index sort_keys(std::span<const double>, std::span<std::int32_t>) noexcept;
template Index select_mass(const Mass<float>&, std::span<const float>, std::span<const float>,
                           std::span<std::int32_t>) noexcept;
template Index select_mass(const Mass<double>&, std::span<const double>, std::span<const double>,
                           std::span<std::int32_t>) noexcept;
template Index mass_count(const Mass<float>&, std::span<const float>,
                          std::span<const std::int32_t>) noexcept;
template Index mass_count(const Mass<double>&, std::span<const double>,
                          std::span<const std::int32_t>) noexcept;
}  // namespace mole::inline MOLE_ABI::stages

// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/limit.hpp"

namespace mole::inline MOLE_ABI::stages {
template Index limit_threshold(float, std::span<std::int32_t>, std::span<float>) noexcept;
template Index limit_threshold(double, std::span<std::int32_t>, std::span<double>) noexcept;
template Index limit_capacity(Index, std::span<std::int32_t>, std::span<std::int32_t>,
                              std::span<float>) noexcept;
template Index limit_capacity(Index, std::span<std::int32_t>, std::span<std::int32_t>,
                              std::span<double>) noexcept;
}  // namespace mole::inline MOLE_ABI::stages

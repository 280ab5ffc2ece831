// SPDX-License-Identifier: Apache-2.0
// Stage `limit`: drops some of the selected experts of one token. The others keep their gates and
// their order, and a dropped one has no slot, so backward needs no twin.
#pragma once

#include <cstdint>
#include <span>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI::stages {

/// Drops gates below `threshold`. Returns how many stay, at the front of both rows.
template <class T>
Index limit_threshold(T threshold, std::span<std::int32_t> chosen, std::span<T> gate) noexcept;

/// Drops experts that have had `capacity` tokens. Called for one token after the other: the earlier
/// token wins. `used` [experts] counts the requests, dropped ones included, and starts at 0.
/// Returns how many stay, at the front of both rows.
template <class T>
Index limit_capacity(Index capacity, std::span<std::int32_t> used, std::span<std::int32_t> chosen,
                     std::span<T> gate) noexcept;

template <class T>
Index limit_threshold(T threshold, std::span<std::int32_t> chosen, std::span<T> gate) noexcept {
  Index kept = 0;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (!(gate[i] >= threshold)) continue;
    chosen[kept] = chosen[i];
    gate[kept++] = gate[i];
  }
  return kept;
}

template <class T>
Index limit_capacity(Index capacity, std::span<std::int32_t> used, std::span<std::int32_t> chosen,
                     std::span<T> gate) noexcept {
  Index kept = 0;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (used[chosen[i]]++ >= capacity) continue;
    chosen[kept] = chosen[i];
    gate[kept++] = gate[i];
  }
  return kept;
}

#ifndef MOLE_HEADER_ONLY
extern template Index limit_threshold(float, std::span<std::int32_t>, std::span<float>) noexcept;
extern template Index limit_threshold(double, std::span<std::int32_t>, std::span<double>) noexcept;
extern template Index limit_capacity(Index, std::span<std::int32_t>, std::span<std::int32_t>,
                                     std::span<float>) noexcept;
extern template Index limit_capacity(Index, std::span<std::int32_t>, std::span<std::int32_t>,
                                     std::span<double>) noexcept;
#endif

}  // namespace mole::inline MOLE_ABI::stages

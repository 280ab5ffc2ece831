// SPDX-License-Identifier: Apache-2.0
// Stages `key` and `select`: which experts one token gets. The choice is a constant in backward.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI::stages {

/// key = value + bias, and -inf where the logit `u` is -inf. An empty bias is 0.
template <class T>
void selection_key(std::span<const T> u, std::span<const T> value, std::span<const T> bias,
                   std::span<T> key) noexcept;

/// The chosen.size() largest keys: larger first, the lower index first among equals. Keys of -inf
/// and NaN are never chosen. Returns how many were found, at the front of `chosen`.
template <class T>
Index select_top_k(std::span<const T> key, std::span<std::int32_t> chosen) noexcept;

template <class T>
void selection_key(std::span<const T> u, std::span<const T> value, std::span<const T> bias,
                   std::span<T> key) noexcept {
  constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();
  for (std::size_t e = 0; e < u.size(); ++e) {
    const T sum = bias.empty() ? value[e] : value[e] + bias[e];
    key[e] = u[e] == kMinusInfinity ? kMinusInfinity : sum;
  }
}

template <class T>
Index select_top_k(std::span<const T> key, std::span<std::int32_t> chosen) noexcept {
  const auto k = static_cast<Index>(chosen.size());
  Index count = 0;
  if (k == 0) return 0;
  for (std::size_t e = 0; e < key.size(); ++e) {
    const T value = key[e];
    if (!(value > -std::numeric_limits<T>::infinity())) continue;
    if (count == k && !(value > key[chosen[k - 1]])) continue;
    Index at = count < k ? count++ : k - 1;
    for (; at > 0 && key[chosen[at - 1]] < value; --at) chosen[at] = chosen[at - 1];
    chosen[at] = static_cast<std::int32_t>(e);
  }
  return count;
}

#ifndef MOLE_HEADER_ONLY
extern template void selection_key(std::span<const float>, std::span<const float>,
                                   std::span<const float>, std::span<float>) noexcept;
extern template void selection_key(std::span<const double>, std::span<const double>,
                                   std::span<const double>, std::span<double>) noexcept;
extern template Index select_top_k(std::span<const float>, std::span<std::int32_t>) noexcept;
extern template Index select_top_k(std::span<const double>, std::span<std::int32_t>) noexcept;
#endif

}  // namespace mole::inline MOLE_ABI::stages

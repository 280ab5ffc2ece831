// SPDX-License-Identifier: Apache-2.0
// Stages `key` and `select`: which experts one token gets. The choice is a constant in backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include "mole/core/config.hpp"
#include "mole/kernels/score_row.hpp"

namespace mole::inline MOLE_ABI::stages {

/// key = value + bias, and -inf where the logit `u` is -inf. An empty bias is 0.
template <class T>
void selection_key(std::span<const T> u, std::span<const T> value, std::span<const T> bias,
                   std::span<T> key) noexcept;

/// The chosen.size() largest keys: larger first, the lower index first among equals. Keys of -inf
/// and NaN are never chosen. Returns how many were found, at the front of `chosen`.
template <class T>
Index select_top_k(std::span<const T> key, std::span<std::int32_t> chosen) noexcept;

/// Indices by falling key, the lower index first among equals, at the front of `order`; keys of
/// -inf and NaN are left out. Returns how many there are. `order` has room for all.
template <class T>
Index sort_keys(std::span<const T> key, std::span<std::int32_t> order) noexcept;

/// Where a cumulative selection ends.
template <class T>
struct Mass {
  T target = T(1);                  ///< of the sum
  bool include_crossing = true;     ///< the expert whose addition passes the target stays
  Index at_least = 1, at_most = 0;  ///< experts, 0 = all
};

/// How many of `order`, from the front, a cumulative selection keeps. C_i is the sum of the first
/// i + 1 values in that order: with include_crossing expert i stays while C_(i-1) <= target,
/// without while C_i <= target.
template <class T>
Index mass_count(const Mass<T>& mass, std::span<const T> value,
                 std::span<const std::int32_t> order) noexcept;

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
  return top_row<T>(key, chosen, best_isa());
}

template <class T>
Index sort_keys(std::span<const T> key, std::span<std::int32_t> order) noexcept {
  return sort_row<T>(key, order, best_isa());
}

template <class T>
Index mass_count(const Mass<T>& mass, std::span<const T> value,
                 std::span<const std::int32_t> order) noexcept {
  const auto found = static_cast<Index>(order.size());
  Index count = 0;
  for (T sum = T(0); count < found; ++count) {
    const T next = sum + value[order[count]];
    if (!((mass.include_crossing ? sum : next) <= mass.target)) break;
    sum = next;
  }
  const Index most = mass.at_most > 0 ? mass.at_most : found;
  return std::min(std::max(count, mass.at_least), std::min(most, found));
}

#ifndef MOLE_HEADER_ONLY
extern template Index sort_keys(std::span<const float>, std::span<std::int32_t>) noexcept;
extern template Index sort_keys(std::span<const double>, std::span<std::int32_t>) noexcept;
extern template Index mass_count(const Mass<float>&, std::span<const float>,
                                 std::span<const std::int32_t>) noexcept;
extern template Index mass_count(const Mass<double>&, std::span<const double>,
                                 std::span<const std::int32_t>) noexcept;
extern template void selection_key(std::span<const float>, std::span<const float>,
                                   std::span<const float>, std::span<float>) noexcept;
extern template void selection_key(std::span<const double>, std::span<const double>,
                                   std::span<const double>, std::span<double>) noexcept;
extern template Index select_top_k(std::span<const float>, std::span<std::int32_t>) noexcept;
extern template Index select_top_k(std::span<const double>, std::span<std::int32_t>) noexcept;
#endif

}  // namespace mole::inline MOLE_ABI::stages

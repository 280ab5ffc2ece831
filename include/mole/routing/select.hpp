// SPDX-License-Identifier: Apache-2.0
// Stages `key` and `select`: which experts one token gets. The choice is a constant in backward.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <span>

#include "mole/core/config.hpp"
#include "mole/kernels/math.hpp"
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

/// What sort_keys and then mass_count select, for shares that are a softmax of the keys, times a
/// constant: those at the front of `order`, which has room for all. Returns how many.
template <class T>
Index select_mass(const Mass<T>& mass, std::span<const T> key, std::span<const T> share,
                  std::span<std::int32_t> order) noexcept;

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

/// Sorts only the experts whose share is large, if they hold the target; 0 if they do not.
template <class T>
Index select_large(const Mass<T>& mass, std::span<const T> key, std::span<const T> share,
                   std::span<std::int32_t> order) noexcept {
  constexpr std::size_t kMost = 256;
  if (key.empty() || key.size() > kMost || select_top_k<T>(key, order.first(1)) == 0) return 0;
  const auto best = static_cast<std::size_t>(order[0]);
  const T large = mass.target / static_cast<T>(key.size());
  const T limit = key[best] + math::log<T>(large / share[best]);
  std::array<T, kMost> large_key;
  std::array<std::int32_t, kMost> expert;
  std::size_t count = 0;
  for (std::size_t e = 0; e < key.size(); ++e) {
    large_key[count] = key[e];
    expert[count] = static_cast<std::int32_t>(e);
    count += key[e] > limit ? 1 : 0;
  }
  sort_keys<T>(std::span<const T>(large_key.data(), count), order.first(count));
  for (std::int32_t& e : order.first(count)) e = expert[e];
  const Index kept = mass_count<T>(mass, share, order.first(count));
  return kept < static_cast<Index>(count) ? kept : 0;
}

template <class T>
Index select_mass(const Mass<T>& mass, std::span<const T> key, std::span<const T> share,
                  std::span<std::int32_t> order) noexcept {
  const Index count = select_large(mass, key, share, order);
  if (count > 0) return count;
  return mass_count<T>(mass, share, order.first(sort_keys<T>(key, order)));
}

#ifndef MOLE_HEADER_ONLY
extern template Index sort_keys(std::span<const float>, std::span<std::int32_t>) noexcept;
extern template Index sort_keys(std::span<const double>, std::span<std::int32_t>) noexcept;
extern template Index mass_count(const Mass<float>&, std::span<const float>,
                                 std::span<const std::int32_t>) noexcept;
extern template Index mass_count(const Mass<double>&, std::span<const double>,
                                 std::span<const std::int32_t>) noexcept;
extern template Index select_mass(const Mass<float>&, std::span<const float>,
                                  std::span<const float>, std::span<std::int32_t>) noexcept;
extern template Index select_mass(const Mass<double>&, std::span<const double>,
                                  std::span<const double>, std::span<std::int32_t>) noexcept;
extern template void selection_key(std::span<const float>, std::span<const float>,
                                   std::span<const float>, std::span<float>) noexcept;
extern template void selection_key(std::span<const double>, std::span<const double>,
                                   std::span<const double>, std::span<double>) noexcept;
extern template Index select_top_k(std::span<const float>, std::span<std::int32_t>) noexcept;
extern template Index select_top_k(std::span<const double>, std::span<std::int32_t>) noexcept;
#endif

}  // namespace mole::inline MOLE_ABI::stages

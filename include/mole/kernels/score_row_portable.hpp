// SPDX-License-Identifier: Apache-2.0
// kernels/score_row.hpp without vector instructions.
#pragma once

#include <algorithm>
#include <limits>

#include "mole/kernels/math.hpp"
#include "mole/kernels/score_row.hpp"

namespace mole::inline MOLE_ABI {
namespace portable {

template <class T>
bool softmax_row(std::span<const T> u, std::span<T> p) noexcept {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T largest = -kInfinity;
  for (const T value : u) largest = value > largest ? value : largest;
  if (largest == kInfinity || largest == -kInfinity) return false;
  T sum[8] = {};
  for (std::size_t e = 0; e < u.size(); ++e) {
    p[e] = math::exp<T>(u[e] - largest);
    sum[e % 8] += p[e];
  }
  const T total = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
  for (T& value : p) value /= total;
  return true;
}

template <class T>
Index top_row(std::span<const T> key, std::span<std::int32_t> chosen) noexcept {
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

template <class T>
Index sort_row(std::span<const T> key, std::span<std::int32_t> order) noexcept {
  Index count = 0;
  for (std::size_t e = 0; e < key.size(); ++e) {
    if (key[e] > -std::numeric_limits<T>::infinity()) order[count++] = static_cast<std::int32_t>(e);
  }
  std::sort(order.begin(), order.begin() + count, [key](std::int32_t a, std::int32_t b) {
    return key[a] > key[b] || (key[a] == key[b] && a < b);
  });
  return count;
}

}  // namespace portable

#ifdef MOLE_HEADER_ONLY
template <class T>
bool softmax_row(std::span<const T> u, std::span<T> p, Isa) noexcept {
  return portable::softmax_row(u, p);
}
template <class T>
Index top_row(std::span<const T> key, std::span<std::int32_t> chosen, Isa) noexcept {
  return portable::top_row(key, chosen);
}
template <class T>
Index sort_row(std::span<const T> key, std::span<std::int32_t> order, Isa) noexcept {
  return portable::sort_row(key, order);
}
#endif

}  // namespace mole::inline MOLE_ABI

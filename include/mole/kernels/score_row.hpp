// SPDX-License-Identifier: Apache-2.0
// Kernels over one row of scores. Every level of the processor gives the same bits.
#pragma once

#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"

namespace mole::inline MOLE_ABI {

/// p = e^(u - max u) / Σ e^(u - max u); the sum is formed of eight, of the experts e with the same
/// e mod 8. p may be u. False, and nothing is written, if the maximum is not finite.
template <class T>
bool softmax_row(std::span<const T> u, std::span<T> p, Isa isa) noexcept;

/// The chosen.size() largest keys: larger first, the lower index first among equals. Keys of -inf
/// and NaN are never chosen. Returns how many were found, at the front of `chosen`.
template <class T>
Index top_row(std::span<const T> key, std::span<std::int32_t> chosen, Isa isa) noexcept;

/// Indices by falling key, the lower index first among equals, at the front of `order`; keys of
/// -inf and NaN are left out. Returns how many there are. `order` has room for all.
template <class T>
Index sort_row(std::span<const T> key, std::span<std::int32_t> order, Isa isa) noexcept;

#ifndef MOLE_HEADER_ONLY
extern template bool softmax_row(std::span<const float>, std::span<float>, Isa) noexcept;
extern template bool softmax_row(std::span<const double>, std::span<double>, Isa) noexcept;
extern template Index top_row(std::span<const float>, std::span<std::int32_t>, Isa) noexcept;
extern template Index top_row(std::span<const double>, std::span<std::int32_t>, Isa) noexcept;
extern template Index sort_row(std::span<const float>, std::span<std::int32_t>, Isa) noexcept;
extern template Index sort_row(std::span<const double>, std::span<std::int32_t>, Isa) noexcept;
#endif

}  // namespace mole::inline MOLE_ABI

#ifdef MOLE_HEADER_ONLY
#include "mole/kernels/score_row_portable.hpp"
#endif

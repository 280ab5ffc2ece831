// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI::simd {

/// kernels/score_row.hpp for the two levels with vector FMA. Only on a machine for which
/// isa_available() says so.
bool softmax_row_avx2(std::span<const float> u, std::span<float> p) noexcept;
bool softmax_row_avx512(std::span<const float> u, std::span<float> p) noexcept;

/// One pass a choice: for few.
Index top_row_avx2(std::span<const float> key, std::span<std::int32_t> chosen) noexcept;
Index top_row_avx512(std::span<const float> key, std::span<std::int32_t> chosen) noexcept;

/// Counts for every key those before it: for at most kMostRanked.
inline constexpr std::size_t kMostRanked = 256;
Index sort_row_avx2(std::span<const float> key, std::span<std::int32_t> order) noexcept;
Index sort_row_avx512(std::span<const float> key, std::span<std::int32_t> order) noexcept;

}  // namespace mole::inline MOLE_ABI::simd

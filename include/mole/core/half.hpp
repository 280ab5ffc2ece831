// SPDX-License-Identifier: Apache-2.0
// bf16 and f16: storage types for weights. Arithmetic is always done in float or double.
// Conversion to a half rounds to nearest, ties to even; NaN stays NaN; overflow gives infinity.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {

/// bfloat16: the upper half of a float (8 exponent bits, 7 fraction bits).
struct bf16 {
  std::uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float value) noexcept;
  explicit operator float() const noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
};

/// IEEE 754 binary16 (5 exponent bits, 10 fraction bits).
struct f16 {
  std::uint16_t bits = 0;
  f16() = default;
  explicit f16(float value) noexcept;
  explicit operator float() const noexcept;
};

template <class T>
inline constexpr bool is_half = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;

/// Exact widening of a stored weight to the compute type (double to float rounds).
template <class T, class W>
constexpr T widen(W stored) noexcept {
  if constexpr (is_half<W>) {
    return static_cast<T>(static_cast<float>(stored));
  } else {
    return static_cast<T>(stored);
  }
}

inline bf16::bf16(float value) noexcept {
  const auto wide = std::bit_cast<std::uint32_t>(value);
  const bool nan = (wide & 0x7fffffffu) > 0x7f800000u;
  const std::uint32_t rounded = wide + 0x7fffu + ((wide >> 16) & 1u);
  bits = static_cast<std::uint16_t>(nan ? (wide >> 16) | 0x40u : rounded >> 16);
}

inline f16::f16(float value) noexcept {
  const auto wide = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (wide >> 16) & 0x8000u;
  const std::uint32_t magnitude = wide & 0x7fffffffu;
  std::uint32_t half = 0;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: drop 13 bits, rebias the exponent by 112
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  } else {  // subnormal or zero: adding 0.5 puts the rounded fraction into the low bits
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(0.5f);
  }
  bits = static_cast<std::uint16_t>(sign | half);
}

inline f16::operator float() const noexcept {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude < 0x400u) {  // subnormal: a whole number of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
}

}  // namespace mole::inline MOLE_ABI

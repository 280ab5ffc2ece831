// SPDX-License-Identifier: Apache-2.0
#include "mole/core/half.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "support/catch.hpp"

using mole::bf16;
using mole::f16;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

/// A format by its numbers, for arithmetic that knows nothing of bits.
struct Format {
  int fraction_bits;
  int least_exponent;  ///< of a normal number
  double overflow;     ///< the first power of two that is too large
};
constexpr Format kF16 = {10, -14, 0x1p16};
constexpr Format kBf16 = {7, -126, 0x1p128};

/// The value of a half pattern that is not NaN.
double value_of(std::uint16_t bits, const Format& format) {
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int field = (bits & 0x7fff) >> format.fraction_bits;
  const double hidden = field == 0 ? 0 : std::ldexp(1.0, format.fraction_bits);
  const int exponent = format.least_exponent + (field == 0 ? 0 : field - 1);
  double value = std::ldexp(hidden + fraction, exponent - format.fraction_bits);
  if (value >= format.overflow) value = kInf;
  return (bits & 0x8000) != 0 ? -value : value;
}

/// The nearest value of the format, ties to the even fraction.
double rounded(double x, const Format& format) {
  if (x == 0 || std::isinf(x)) return x;
  const int exponent = std::max(std::ilogb(x), format.least_exponent);
  const double unit = std::ldexp(1.0, exponent - format.fraction_bits);
  const double nearest = std::nearbyint(x / unit) * unit;
  return std::fabs(nearest) >= format.overflow ? std::copysign(kInf, x) : nearest;
}

bool is_nan(std::uint16_t bits, const Format& format) {
  const int infinity = 0x7fff >> format.fraction_bits << format.fraction_bits;
  return (bits & 0x7fff) > infinity;
}

template <class Half>
Half pattern(int bits) {
  Half half;
  half.bits = static_cast<std::uint16_t>(bits);
  return half;
}

template <class Half>
long wrong_widenings(const Format& format) {
  long wrong = 0;
  for (int bits = 0; bits <= 0xffff; ++bits) {
    const auto half = pattern<Half>(bits);
    const float wide = static_cast<float>(half);
    if (is_nan(half.bits, format)) {
      wrong += std::isnan(wide) && std::signbit(wide) == (bits >= 0x8000) ? 0 : 1;
    } else {
      const double expected = value_of(half.bits, format);
      wrong += wide == expected && std::signbit(wide) == std::signbit(expected) ? 0 : 1;
    }
  }
  return wrong;
}

template <class Half>
long wrong_round_trips(const Format& format) {
  const int quiet = 1 << (format.fraction_bits - 1);
  long wrong = 0;
  for (int bits = 0; bits <= 0xffff; ++bits) {
    const auto half = pattern<Half>(bits);
    const int back = Half(static_cast<float>(half)).bits;
    wrong += back == (is_nan(half.bits, format) ? bits | quiet : bits) ? 0 : 1;
  }
  return wrong;
}

template <class Half>
bool rounds_right(float x, const Format& format) {
  const Half half(x);
  if (std::isnan(x)) return is_nan(half.bits, format) && (half.bits >= 0x8000) == std::signbit(x);
  const double expected = rounded(x, format);
  return !is_nan(half.bits, format) && value_of(half.bits, format) == expected &&
         (half.bits >= 0x8000) == std::signbit(x);
}

/// Every 4099th float.
template <class Half>
long wrong_roundings(const Format& format) {
  long wrong = 0;
  for (std::uint64_t bits = 0; bits <= 0xffffffffu; bits += 4099) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    wrong += rounds_right<Half>(x, format) ? 0 : 1;
  }
  return wrong;
}

/// The middle between any two neighbours, and the floats beside it.
template <class Half>
long wrong_ties(const Format& format) {
  long wrong = 0;
  for (int bits = 0; bits < 0x7fff; ++bits) {
    if (is_nan(static_cast<std::uint16_t>(bits + 1), format)) continue;
    const double low = value_of(static_cast<std::uint16_t>(bits), format);
    double high = value_of(static_cast<std::uint16_t>(bits + 1), format);
    if (std::isinf(high)) high = format.overflow;
    const auto middle = static_cast<float>((low + high) / 2);
    for (const float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, kInf)}) {
      wrong += rounds_right<Half>(x, format) && rounds_right<Half>(-x, format) ? 0 : 1;
    }
  }
  return wrong;
}

}  // namespace

TEST_CASE("every half widens to its value") {
  CHECK(wrong_widenings<f16>(kF16) == 0);
  CHECK(wrong_widenings<bf16>(kBf16) == 0);
}

TEST_CASE("every half survives the way through float, NaN becomes quiet") {
  CHECK(wrong_round_trips<f16>(kF16) == 0);
  CHECK(wrong_round_trips<bf16>(kBf16) == 0);
}

TEST_CASE("floats round to the nearest half, ties to even") {
  CHECK(wrong_roundings<f16>(kF16) == 0);
  CHECK(wrong_roundings<bf16>(kBf16) == 0);
  CHECK(wrong_ties<f16>(kF16) == 0);
  CHECK(wrong_ties<bf16>(kBf16) == 0);
}

TEST_CASE("halves of known values") {
  CHECK(f16(1.0f).bits == 0x3c00);
  CHECK(f16(-2.0f).bits == 0xc000);
  CHECK(f16(65504.0f).bits == 0x7bff);
  CHECK(f16(65519.996f).bits == 0x7bff);
  CHECK(f16(65520.0f).bits == 0x7c00);
  CHECK(f16(-kInf).bits == 0xfc00);
  CHECK(f16(0x1p-24f).bits == 0x0001);
  CHECK(f16(0x1p-25f).bits == 0x0000);
  CHECK(f16(-0.0f).bits == 0x8000);
  CHECK(bf16(1.0f).bits == 0x3f80);
  CHECK(bf16(-2.0f).bits == 0xc000);
  CHECK(bf16(std::numeric_limits<float>::max()).bits == 0x7f80);
  CHECK(bf16(0x1.01p0f).bits == 0x3f80);
  CHECK(bf16(0x1.03p0f).bits == 0x3f82);
  CHECK(bf16(-0.0f).bits == 0x8000);
  CHECK(bf16().bits == 0);
  CHECK(f16().bits == 0);
}

TEST_CASE("a NaN whose payload is in the low bits stays NaN") {
  for (const std::uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu}) {
    const float nan = std::bit_cast<float>(bits);
    CHECK(std::isnan(static_cast<float>(bf16(nan))));
    CHECK(std::isnan(static_cast<float>(f16(nan))));
  }
}

TEST_CASE("widen keeps every stored value") {
  CHECK(mole::widen<double>(f16(0x1p-24f)) == 0x1p-24);
  CHECK(mole::widen<float>(bf16(-1.5f)) == -1.5f);
  CHECK(mole::widen<double>(0.1f) == static_cast<double>(0.1f));
  CHECK(mole::widen<float>(0.1) == 0.1f);
  static_assert(mole::is_half<f16> && mole::is_half<bf16> && !mole::is_half<float>);
  static_assert(sizeof(f16) == 2 && sizeof(bf16) == 2);
  static_assert(std::is_trivially_copyable_v<f16> && std::is_trivially_copyable_v<bf16>);
  static_assert(!std::is_convertible_v<float, bf16> && !std::is_convertible_v<f16, float>);
}

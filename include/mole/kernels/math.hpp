// SPDX-License-Identifier: Apache-2.0
// Elementary functions with the same bits whatever the compiler's flags.
//
// float: own argument reductions and polynomials, within 2 ulp of the exact value (sigmoid 2.5) for
// every finite input, subnormal results included; 4 ulp are promised. double: the math library.
// NaN gives NaN, overflow infinity, and zeros keep their sign where the function does. Rounding
// must be to nearest. A product that feeds a sum is fused, or exact.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI::math {

template <class T>
T exp(T x) noexcept;

/// e^x - 1, accurate near 0.
template <class T>
T expm1(T x) noexcept;

/// log(0) = -infinity, log(x < 0) = NaN.
template <class T>
T log(T x) noexcept;

/// ln(1 + x), accurate near 0.
template <class T>
T log1p(T x) noexcept;

template <class T>
T tanh(T x) noexcept;

/// 1 / (1 + e^-x). Accurate in both tails: e^x for very negative x.
template <class T>
T sigmoid(T x) noexcept;

/// ln(1 + e^x). Accurate in both tails: e^x for very negative x, x for large x.
template <class T>
T softplus(T x) noexcept;

template <class T>
T sqrt(T x) noexcept;

// The single-precision algorithms. They are templates so that only the library instantiates them.
namespace single {

inline constexpr float kLn2High = 0x1.62e430p-1f;
inline constexpr float kLn2Low = -0x1.05c610p-29f;
/// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2.
inline constexpr float kExpTail[5] = {0x1.000000p-1f, 0x1.5554b0p-3f, 0x1.555486p-5f,
                                      0x1.12280cp-7f, 0x1.6d9922p-10f};
inline constexpr float kExpZeroBelow = -104;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// value = c0 + z (c1 + z (c2 + ...)).
template <class T>
T polynomial(T, T last) noexcept {
  return last;
}
template <class T, class... More>
T polynomial(T z, T first, More... more) noexcept {
  return std::fma(polynomial(z, more...), z, first);
}

/// 2^n for -126 <= n <= 127.
template <class T>
T power_of_two(int n) noexcept {
  return std::bit_cast<T>((n + 127) << 23);
}

/// e^x = 2^n e^r with |r| <= ln(2) / 2, and e^r = 1 + r + tail r^2.
template <class T>
struct Reduced {
  int n;
  T r, tail;
};

template <class T>
Reduced<T> reduce(T x) noexcept {
  constexpr T kToInteger = 0x1.8p23f;  // in this range the last bit of a float is worth 1
  const T shifted = std::fma(x, 0x1.715476p0f, kToInteger);
  const int n = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(kToInteger);
  const T count = static_cast<T>(n);
  const T r = std::fma(-count, kLn2Low, std::fma(-count, kLn2High, x));
  const T tail = polynomial<T>(r, kExpTail[0], kExpTail[1], kExpTail[2], kExpTail[3], kExpTail[4]);
  return {n, r, tail};
}

template <class T>
T exp(T x) noexcept {
  if (x != x) return x;
  if (x > 89) return kInfinity;
  if (x < kExpZeroBelow) return 0;
  const auto [n, r, tail] = reduce(x);
  const T value = std::fma(std::fma(tail, r, T(1)), r, T(1));
  const int half = n >> 1;  // two factors: 2^n alone may overflow or be subnormal
  return value * power_of_two<T>(half) * power_of_two<T>(n - half);
}

template <class T>
T expm1(T x) noexcept {
  if (x != x || x == 0) return x;
  if (x > 20) return exp(x);
  if (x < -18) return -1;
  const auto [n, r, tail] = reduce(x);
  const T scale = power_of_two<T>(n);
  return std::fma(scale, std::fma(r * r, tail, r), scale - 1);
}

/// The n that puts x 2^-n into [sqrt(1/2), sqrt(2)), for normal x > 0.
template <class T>
int binary_exponent(T x) noexcept {
  return (std::bit_cast<std::int32_t>(x) - 0x3f3504f3) >> 23;
}

/// n ln(2) + ln(1 + f). With s = f / (2 + f): ln(1 + f) = f - f^2 / 2 + s (f^2 / 2 + s^2 P(s^2)).
template <class T>
T log_of_parts(int n, T f) noexcept {
  const T s = f / (2 + f);
  const T z = s * s;
  const T p = polynomial<T>(z, 0x1.55557ap-1f, 0x1.995e9cp-2f, 0x1.31e678p-2f);
  const T half = T(0.5) * f;
  const T count = static_cast<T>(n);
  T low = std::fma(s, std::fma(z, p, half * f), count * kLn2Low);
  low = std::fma(-half, f, low);
  return std::fma(count, kLn2High, f + low);
}

template <class T>
T log(T x) noexcept {
  if (x != x || x == kInfinity) return x;
  if (x <= 0) return x < 0 ? kNan : -kInfinity;
  const bool subnormal = x < std::numeric_limits<T>::min();
  const T normal = subnormal ? x * T(0x1p23f) : x;
  const int n = binary_exponent(normal);
  const T f = std::bit_cast<T>(std::bit_cast<std::int32_t>(normal) - n * (1 << 23)) - 1;
  return log_of_parts(subnormal ? n - 23 : n, f);
}

template <class T>
T log1p(T x) noexcept {
  if (x != x || x == 0) return x;
  if (x <= -1) return x < -1 ? kNan : -kInfinity;
  if (x > 0x1p25f) return log(x);
  const int n = binary_exponent(1 + x);
  const T scale = power_of_two<T>(-n);
  return log_of_parts(n, n == 0 ? x : std::fma(x, scale, scale - 1));
}

template <class T>
T tanh(T x) noexcept {
  const T a = std::fabs(x);
  T value = a;
  if (a < T(0.625)) {
    const T z = a * a;
    const T p = polynomial<T>(z, -0x1.555532p-2f, 0x1.110726p-3f, -0x1.b83c5ap-5f, 0x1.52269ap-6f,
                              -0x1.75e1cap-8f);
    value = std::fma(a * z, p, a);
  } else if (a < T(9.02)) {
    value = 1 - 2 / (exp(2 * a) + 1);
  } else if (a == a) {
    value = 1;
  }
  return std::copysign(value, x);
}

}  // namespace single

template <class T>
T exp(T x) noexcept {
  if constexpr (std::is_same_v<T, float>) return single::exp(x);
  return std::exp(x);
}

template <class T>
T expm1(T x) noexcept {
  if constexpr (std::is_same_v<T, float>) return single::expm1(x);
  return std::expm1(x);
}

template <class T>
T log(T x) noexcept {
  if constexpr (std::is_same_v<T, float>) return single::log(x);
  return std::log(x);
}

template <class T>
T log1p(T x) noexcept {
  if constexpr (std::is_same_v<T, float>) return single::log1p(x);
  return std::log1p(x);
}

template <class T>
T tanh(T x) noexcept {
  if constexpr (std::is_same_v<T, float>) return single::tanh(x);
  return std::tanh(x);
}

template <class T>
T sigmoid(T x) noexcept {
  const T e = exp(-std::fabs(x));
  return (x < 0 ? e : T(1)) / (1 + e);
}

template <class T>
T softplus(T x) noexcept {
  return (x < 0 ? T(0) : x) + log1p(exp(-std::fabs(x)));
}

template <class T>
T sqrt(T x) noexcept {
  return std::sqrt(x);
}

#ifndef MOLE_HEADER_ONLY
// The library's own float versions take hardware fma where the machine has it: same bits, faster.
template <>
float exp(float x) noexcept;
template <>
float expm1(float x) noexcept;
template <>
float log(float x) noexcept;
template <>
float log1p(float x) noexcept;
template <>
float tanh(float x) noexcept;
extern template float sigmoid(float) noexcept;
extern template float softplus(float) noexcept;
extern template float sqrt(float) noexcept;
extern template double exp(double) noexcept;
extern template double expm1(double) noexcept;
extern template double log(double) noexcept;
extern template double log1p(double) noexcept;
extern template double tanh(double) noexcept;
extern template double sigmoid(double) noexcept;
extern template double softplus(double) noexcept;
extern template double sqrt(double) noexcept;
#endif

}  // namespace mole::inline MOLE_ABI::math

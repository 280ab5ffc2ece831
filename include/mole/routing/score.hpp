// SPDX-License-Identifier: Apache-2.0
// Stage `score`: from the logits of one token to scores over all experts.
//
//   softmax e^u / Σ e^u      sigmoid 1 / (1 + e^-u)      sqrt_softplus √ln(1 + e^u)
//
// A logit of -inf scores 0. With a logit of +inf, softmax and sqrt_softplus give the experts that
// have it equal shares of 1, and 0 to the others.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/kernels/math.hpp"
#include "mole/kernels/score_row.hpp"

namespace mole::inline MOLE_ABI {

enum class Score { softmax, sigmoid, sqrt_softplus };
constexpr std::array<std::string_view, 3> enum_names(Score) noexcept {
  return {"softmax", "sigmoid", "sqrt_softplus"};
}

namespace stages {

/// Gives every +inf of `u` an equal share of 1 and 0 to the rest. False, and nothing is written, if
/// there is none.
template <class T>
bool split_infinite(std::span<const T> u, std::span<T> share) noexcept;

/// p = softmax(u), the maximum subtracted. All 0 if every u is -inf. p may be u.
template <class T>
void softmax(std::span<const T> u, std::span<T> p) noexcept;

/// du += p (dp - Σ p dp).
template <class T>
void softmax_backward(std::span<const T> p, std::span<const T> dp, std::span<T> du) noexcept;

template <class T>
void score(Score kind, std::span<const T> u, std::span<T> s) noexcept;

/// du += the gradient that arrives by s = score(u).
template <class T>
void score_backward(Score kind, std::span<const T> u, std::span<const T> s, std::span<const T> ds,
                    std::span<T> du) noexcept;

/// ln s(u), or u itself for softmax, whose common factor has no influence on shares. Neither
/// overflows nor underflows.
template <class T>
T log_score(Score kind, T u) noexcept;

/// d log_score / du.
template <class T>
T log_score_slope(Score kind, T u) noexcept;

template <class T>
bool split_infinite(std::span<const T> u, std::span<T> share) noexcept {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  Index count = 0;
  for (const T value : u) count += value == kInfinity;
  if (count == 0) return false;
  for (std::size_t e = 0; e < u.size(); ++e) {
    share[e] = u[e] == kInfinity ? T(1) / static_cast<T>(count) : T(0);
  }
  return true;
}

template <class T>
void softmax(std::span<const T> u, std::span<T> p) noexcept {
  if (softmax_row<T>(u, p, best_isa()) || split_infinite(u, p)) return;
  for (T& value : p) value = T(0);
}

template <class T>
void softmax_backward(std::span<const T> p, std::span<const T> dp, std::span<T> du) noexcept {
  T mean = T(0);
  for (std::size_t e = 0; e < p.size(); ++e) mean = std::fma(p[e], dp[e], mean);
  for (std::size_t e = 0; e < p.size(); ++e) du[e] = std::fma(p[e], dp[e] - mean, du[e]);
}

template <class T>
void score(Score kind, std::span<const T> u, std::span<T> s) noexcept {
  if (kind == Score::softmax) return softmax(u, s);
  if (kind == Score::sqrt_softplus && split_infinite(u, s)) return;
  for (std::size_t e = 0; e < u.size(); ++e) {
    s[e] = kind == Score::sigmoid ? math::sigmoid<T>(u[e]) : std::sqrt(math::softplus<T>(u[e]));
  }
}

template <class T>
void score_backward(Score kind, std::span<const T> u, std::span<const T> s, std::span<const T> ds,
                    std::span<T> du) noexcept {
  if (kind == Score::softmax) return softmax_backward(s, ds, du);
  for (std::size_t e = 0; e < u.size(); ++e) {
    if (!std::isfinite(u[e]) || s[e] == T(0)) continue;
    const T slope =
        kind == Score::sigmoid ? s[e] * (T(1) - s[e]) : math::sigmoid<T>(u[e]) / (s[e] + s[e]);
    du[e] = std::fma(ds[e], slope, du[e]);
  }
}

// Below this ln(1 + e^u) is e^u in either precision.
inline constexpr int kSoftplusIsExp = -40;

template <class T>
T log_score(Score kind, T u) noexcept {
  if (kind == Score::softmax) return u;
  if (kind == Score::sigmoid) return -math::softplus<T>(-u);
  return T(0.5) * (u < kSoftplusIsExp ? u : math::log<T>(math::softplus<T>(u)));
}

template <class T>
T log_score_slope(Score kind, T u) noexcept {
  if (kind == Score::softmax) return T(1);
  if (kind == Score::sigmoid) return math::sigmoid<T>(-u);
  return u < kSoftplusIsExp ? T(0.5) : T(0.5) * math::sigmoid<T>(u) / math::softplus<T>(u);
}

#ifndef MOLE_HEADER_ONLY
extern template bool split_infinite(std::span<const float>, std::span<float>) noexcept;
extern template bool split_infinite(std::span<const double>, std::span<double>) noexcept;
extern template void softmax(std::span<const float>, std::span<float>) noexcept;
extern template void softmax(std::span<const double>, std::span<double>) noexcept;
extern template void softmax_backward(std::span<const float>, std::span<const float>,
                                      std::span<float>) noexcept;
extern template void softmax_backward(std::span<const double>, std::span<const double>,
                                      std::span<double>) noexcept;
extern template void score(Score, std::span<const float>, std::span<float>) noexcept;
extern template void score(Score, std::span<const double>, std::span<double>) noexcept;
extern template void score_backward(Score, std::span<const float>, std::span<const float>,
                                    std::span<const float>, std::span<float>) noexcept;
extern template void score_backward(Score, std::span<const double>, std::span<const double>,
                                    std::span<const double>, std::span<double>) noexcept;
extern template float log_score(Score, float) noexcept;
extern template double log_score(Score, double) noexcept;
extern template float log_score_slope(Score, float) noexcept;
extern template double log_score_slope(Score, double) noexcept;
#endif

}  // namespace stages
}  // namespace mole::inline MOLE_ABI

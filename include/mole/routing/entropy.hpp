// SPDX-License-Identifier: Apache-2.0
// Entropy of one token's scores: how undecided the router is.
//
//   shannon         H = -Σ r ln r                    r = p + epsilon
//   tsallis, q ≠ 1  H = (1 - Σ r^q) / (q - 1)        q = 1 is shannon
//   renyi, q ≠ 1    H = ln(Σ r^q + 1e-10) / (1 - q)
//
// `normalise` divides by the value of the uniform distribution, so that it is 1 there (but for
// epsilon): ln E, and (1 - E^(1-q)) / (q - 1) for tsallis. With epsilon 0, 0 ln 0 is 0.
//
// Tsallis and Rényi as in DynMoLE (Li et al., 2025).
#pragma once

#include <array>
#include <cmath>
#include <span>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/kernels/math.hpp"

namespace mole::inline MOLE_ABI {

enum class EntropyKind { shannon, tsallis, renyi };
constexpr std::array<std::string_view, 3> enum_names(EntropyKind) noexcept {
  return {"shannon", "tsallis", "renyi"};
}

/// Which entropy. `index` must be positive.
template <class T>
struct Entropy {
  EntropyKind kind = EntropyKind::tsallis;
  T index = T(1.1);  ///< q; unused by shannon
  T epsilon = T(1e-5);
  bool normalise = true;
};

namespace stages {

/// H of the scores of one token. One expert, normalised, has the entropy 0.
template <class T>
T entropy(const Entropy<T>& how, std::span<const T> p) noexcept;

/// dp += dentropy · ∂H/∂p.
template <class T>
void entropy_backward(const Entropy<T>& how, std::span<const T> p, T dentropy,
                      std::span<T> dp) noexcept;

inline constexpr double kRenyiEpsilon = 1e-10;

template <class T>
bool is_shannon(const Entropy<T>& how) noexcept {
  return how.kind == EntropyKind::shannon || how.index == T(1);
}

template <class T>
T power(T base, T exponent) noexcept {
  return base > T(0) ? math::exp<T>(exponent * math::log<T>(base)) : T(0);
}

/// What H is divided by.
template <class T>
T entropy_unit(const Entropy<T>& how, std::size_t experts) noexcept {
  if (!how.normalise) return T(1);
  const T count = static_cast<T>(experts);
  if (is_shannon(how) || how.kind == EntropyKind::renyi) return math::log<T>(count);
  return (T(1) - power<T>(count, T(1) - how.index)) / (how.index - T(1));
}

template <class T>
T entropy(const Entropy<T>& how, std::span<const T> p) noexcept {
  if (how.normalise && p.size() < 2) return T(0);
  const T unit = entropy_unit(how, p.size());
  T sum = T(0);
  for (const T value : p) {
    const T r = value + how.epsilon;
    if (!is_shannon(how)) {
      sum += power<T>(r, how.index);
    } else if (r > T(0)) {
      sum = std::fma(r, math::log<T>(r), sum);
    }
  }
  if (is_shannon(how)) return -sum / unit;
  if (how.kind == EntropyKind::tsallis) return (T(1) - sum) / (how.index - T(1)) / unit;
  return math::log<T>(sum + T(kRenyiEpsilon)) / (T(1) - how.index) / unit;
}

template <class T>
void entropy_backward(const Entropy<T>& how, std::span<const T> p, T dentropy,
                      std::span<T> dp) noexcept {
  if (how.normalise && p.size() < 2) return;
  T factor = dentropy / entropy_unit(how, p.size());
  if (!is_shannon(how)) {
    T sum = T(kRenyiEpsilon);
    for (const T value : p) sum += power<T>(value + how.epsilon, how.index);
    const T slope = how.index / (T(1) - how.index);
    factor *= how.kind == EntropyKind::tsallis ? slope : slope / sum;
  }
  for (std::size_t e = 0; e < p.size(); ++e) {
    const T r = p[e] + how.epsilon;
    if (!(r > T(0))) continue;
    const T slope = is_shannon(how) ? -(math::log<T>(r) + T(1)) : power<T>(r, how.index - T(1));
    dp[e] = std::fma(factor, slope, dp[e]);
  }
}

#ifndef MOLE_HEADER_ONLY
extern template float entropy(const Entropy<float>&, std::span<const float>) noexcept;
extern template double entropy(const Entropy<double>&, std::span<const double>) noexcept;
extern template void entropy_backward(const Entropy<float>&, std::span<const float>, float,
                                      std::span<float>) noexcept;
extern template void entropy_backward(const Entropy<double>&, std::span<const double>, double,
                                      std::span<double>) noexcept;
#endif

}  // namespace stages
}  // namespace mole::inline MOLE_ABI

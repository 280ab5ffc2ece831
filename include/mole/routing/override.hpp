// SPDX-License-Identifier: Apache-2.0
// Stage `override`: what the caller forces on one call, and what becomes of NaN and infinity.
//
//   logits_e <- logits_e + logit_bias_e, then -inf where the expert is forbidden, another one is
//   forced, or the sum is NaN
//
// From here on -inf means "not available": such an expert is never selected, its score is 0 and its
// logit has no gradient. +inf stands for its limit: it takes the whole weight, several share it.
#pragma once

#include <cmath>
#include <limits>
#include <span>

#include "mole/core/config.hpp"
#include "mole/routing/tokens.hpp"

namespace mole::inline MOLE_ABI::stages {

/// False where the overrides take expert `e` away from token `t`.
template <class T>
bool is_allowed(const Overrides<T>& overrides, Index t, Index e) noexcept;

/// The row `logits` [experts] of token `t`.
template <class T>
void override_logits(const Overrides<T>& overrides, Index t, std::span<T> logits) noexcept;

/// Drops the gradient of logits that are not finite. `logits` is what override_logits left.
template <class T>
void override_logits_backward(std::span<const T> logits, std::span<T> dlogits) noexcept;

template <class T>
bool is_allowed(const Overrides<T>& overrides, Index t, Index e) noexcept {
  if (!overrides.forced.empty() && overrides.forced[t] >= 0 && overrides.forced[t] != e) {
    return false;
  }
  const auto& forbidden = overrides.forbidden;
  return forbidden.data == nullptr || forbidden(forbidden.rows == 1 ? 0 : t, e) == 0;
}

template <class T>
void override_logits(const Overrides<T>& overrides, Index t, std::span<T> logits) noexcept {
  constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();
  const auto& bias = overrides.logit_bias;
  const T* add = bias.data == nullptr ? nullptr : bias.row(bias.rows == 1 ? 0 : t).data();
  const bool restricted = overrides.forbidden.data != nullptr || !overrides.forced.empty();
  for (std::size_t e = 0; e < logits.size(); ++e) {
    if (add != nullptr) logits[e] += add[e];
    const bool taken = restricted && !is_allowed(overrides, t, static_cast<Index>(e));
    if (taken || std::isnan(logits[e])) logits[e] = kMinusInfinity;
  }
}

template <class T>
void override_logits_backward(std::span<const T> logits, std::span<T> dlogits) noexcept {
  for (std::size_t e = 0; e < logits.size(); ++e) {
    if (!std::isfinite(logits[e])) dlogits[e] = T(0);
  }
}

#ifndef MOLE_HEADER_ONLY
extern template bool is_allowed(const Overrides<float>&, Index, Index) noexcept;
extern template bool is_allowed(const Overrides<double>&, Index, Index) noexcept;
extern template void override_logits(const Overrides<float>&, Index, std::span<float>) noexcept;
extern template void override_logits(const Overrides<double>&, Index, std::span<double>) noexcept;
extern template void override_logits_backward(std::span<const float>, std::span<float>) noexcept;
extern template void override_logits_backward(std::span<const double>, std::span<double>) noexcept;
#endif

}  // namespace mole::inline MOLE_ABI::stages

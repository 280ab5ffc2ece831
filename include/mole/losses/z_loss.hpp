// SPDX-License-Identifier: Apache-2.0
// The router z-loss: keeps logits small.
//
//   loss = weight · (1/N) Σ_t lse_t²      lse_t = ln Σ_e e^l_te      N = number of real tokens
//   dlogits(t, e) += weight · 2 lse_t · softmax(l_t)_e / N
//
// Zoph et al., "ST-MoE", 2022. Logits of -infinity count as e^l = 0; a token without an available
// expert adds nothing.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/math.hpp"
#include "mole/losses/token_mask.hpp"

namespace mole::inline MOLE_ABI {

/// logits [tokens, experts]; dlogits likewise, or empty. Throws shape_mismatch.
template <class T>
T z_loss(std::type_identity_t<T> weight, MatView<const T> logits,
         std::type_identity_t<MatView<T>> dlogits, const TokenMask& mask = {});

template <class T>
T z_loss(std::type_identity_t<T> weight, MatView<const T> logits,
         std::type_identity_t<MatView<T>> dlogits, const TokenMask& mask) {
  mask.check(logits.rows);
  check_gradient("dlogits", logits, dlogits);
  const double real = mask.count(logits.rows);
  double loss = 0;
  for (Index t = 0; t < logits.rows; ++t) {
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const T l : logits.row(t)) largest = l > largest ? static_cast<double>(l) : largest;
    if (!mask.is_real(t) || !std::isfinite(largest)) continue;
    for (const T l : logits.row(t)) sum += math::exp<double>(l - largest);
    const double lse = largest + math::log<double>(sum);
    loss = std::fma(lse, lse, loss);
    for (Index e = 0; dlogits.data != nullptr && e < logits.cols; ++e) {
      const double share = math::exp<double>(logits(t, e) - largest) / sum;
      dlogits(t, e) += static_cast<T>(weight * 2 * lse * share / real);
    }
  }
  return real > 0 ? static_cast<T>(weight * loss / real) : T(0);
}

#ifndef MOLE_HEADER_ONLY
extern template float z_loss(float, MatView<const float>, MatView<float>, const TokenMask&);
extern template double z_loss(double, MatView<const double>, MatView<double>, const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

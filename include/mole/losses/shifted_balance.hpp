// SPDX-License-Identifier: Apache-2.0
// The balance loss of AdaMoLE, on scores above a learned threshold.
//
//   loss = weight · E · Σ_e (n_e / N) · (1/N) Σ_t (p_te - τ_t)      n_e = tokens with p_te >= τ_t
//   dprob(t, e) += weight · E · n_e / N²      dτ_t += - Σ_e of that
//
// It may be negative. N = number of real tokens. n is a constant in the gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/losses/token_mask.hpp"

namespace mole::inline MOLE_ABI {

/// prob [tokens, experts], threshold [tokens]; the gradients likewise, or empty. Throws
/// shape_mismatch. LearnedThresholdRule has τ and its slope.
template <class T>
T shifted_balance_loss(std::type_identity_t<T> weight, MatView<const T> prob,
                       std::type_identity_t<std::span<const T>> threshold,
                       std::type_identity_t<MatView<T>> dprob,
                       std::type_identity_t<std::span<T>> dthreshold, const Context& context,
                       const TokenMask& mask = {});

template <class T>
T shifted_balance_loss(std::type_identity_t<T> weight, MatView<const T> prob,
                       std::type_identity_t<std::span<const T>> threshold,
                       std::type_identity_t<MatView<T>> dprob,
                       std::type_identity_t<std::span<T>> dthreshold, const Context& context,
                       const TokenMask& mask) {
  mask.check(prob.rows);
  check_gradient("dprob", prob, dprob);
  require(static_cast<Index>(threshold.size()) == prob.rows &&
              (dthreshold.empty() || dthreshold.size() == threshold.size()),
          Errc::shape_mismatch, "threshold: expected ", prob.rows, " values, got ",
          threshold.size());
  const double real = mask.count(prob.rows);
  if (real == 0) return T(0);
  const Workspace::Frame frame(context.scratch);
  const auto slope = context.scratch.take<double>(prob.cols);
  const auto sum = context.scratch.take<double>(prob.cols);
  std::fill(slope.begin(), slope.end(), 0.0);
  std::fill(sum.begin(), sum.end(), 0.0);
  for (Index t = 0; t < prob.rows; ++t) {
    for (Index e = 0; e < prob.cols && mask.is_real(t); ++e) {
      const T above = prob(t, e) - threshold[t];
      slope[e] += above >= T(0);
      sum[e] += above;
    }
  }
  double value = 0, total = 0;
  for (Index e = 0; e < prob.cols; ++e) {
    slope[e] *= weight * static_cast<double>(prob.cols) / (real * real);
    value = std::fma(slope[e], sum[e], value);
    total += slope[e];
  }
  for (Index t = 0; t < prob.rows; ++t) {
    if (!mask.is_real(t)) continue;
    for (Index e = 0; e < prob.cols && dprob.data != nullptr; ++e) {
      dprob(t, e) += static_cast<T>(slope[e]);
    }
    if (!dthreshold.empty()) dthreshold[t] -= static_cast<T>(total);
  }
  return static_cast<T>(value);
}

#ifndef MOLE_HEADER_ONLY
extern template float shifted_balance_loss(float, MatView<const float>, std::span<const float>,
                                           MatView<float>, std::span<float>, const Context&,
                                           const TokenMask&);
extern template double shifted_balance_loss(double, MatView<const double>, std::span<const double>,
                                            MatView<double>, std::span<double>, const Context&,
                                            const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

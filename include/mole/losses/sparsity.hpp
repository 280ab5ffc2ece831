// SPDX-License-Identifier: Apache-2.0
// The sparsity loss of ReMoE, which drives the number of experts a token has toward a target.
//
//   plain      weight · (1/N) Σ_t Σ_e g_te                        g = gates of a ReluRouter
//   balanced   weight · E Σ_e (n_e / (target_k N)) · (1/N) Σ_t g_te     n_e = tokens with g_te > 0
//
// N = number of real tokens. n is a constant in the gradient. Its weight is steered by
// SparsityController (routing/balance_bias.hpp).
//
// Wang et al., "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing", 2024.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/losses/token_mask.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct SparsityLoss {
  T weight = T(1);
  T target_k = T(1);
  bool balanced = true;
};

/// gate [tokens, experts]: the scores of a ReluRouter's tape; dgate likewise, or empty; where a
/// gate is 0 nothing is added. Throws shape_mismatch.
template <class T>
T sparsity_loss(const SparsityLoss<T>& loss, MatView<const T> gate,
                std::type_identity_t<MatView<T>> dgate, const Context& context,
                const TokenMask& mask = {});

template <class T>
T sparsity_loss(const SparsityLoss<T>& loss, MatView<const T> gate,
                std::type_identity_t<MatView<T>> dgate, const Context& context,
                const TokenMask& mask) {
  mask.check(gate.rows);
  check_gradient("dgate", gate, dgate);
  const double real = mask.count(gate.rows);
  if (real == 0) return T(0);
  const Workspace::Frame frame(context.scratch);
  const auto slope = context.scratch.take<double>(gate.cols);
  std::fill(slope.begin(), slope.end(), loss.weight / real);
  if (loss.balanced) {
    std::fill(slope.begin(), slope.end(), 0.0);
    for (Index t = 0; t < gate.rows; ++t) {
      for (Index e = 0; e < gate.cols && mask.is_real(t); ++e) slope[e] += gate(t, e) > T(0);
    }
    for (double& s : slope) {
      s *= loss.weight * static_cast<double>(gate.cols) / (loss.target_k * real * real);
    }
  }
  double value = 0;
  for (Index t = 0; t < gate.rows; ++t) {
    for (Index e = 0; e < gate.cols && mask.is_real(t); ++e) {
      if (!(gate(t, e) > T(0))) continue;
      value = std::fma(slope[e], gate(t, e), value);
      if (dgate.data != nullptr) dgate(t, e) += static_cast<T>(slope[e]);
    }
  }
  return static_cast<T>(value);
}

#ifndef MOLE_HEADER_ONLY
extern template float sparsity_loss(const SparsityLoss<float>&, MatView<const float>,
                                    MatView<float>, const Context&, const TokenMask&);
extern template double sparsity_loss(const SparsityLoss<double>&, MatView<const double>,
                                     MatView<double>, const Context&, const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

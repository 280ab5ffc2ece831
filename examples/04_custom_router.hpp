// SPDX-License-Identifier: Apache-2.0
// A router of one's own: every expert whose sigmoid score is above a threshold works, as much as it
// is above it. Tokens choose how many experts they need, from none to all.
//
//   s = σ(l)     gate = s - threshold where that is positive, else 0
//   backward: ds = dgate where gate > 0, + dprob      dl = ds · s (1 - s)
#pragma once

#include <cmath>
#include <span>

#include "mole/kernels/math.hpp"
#include "mole/routing/rule_router.hpp"

template <class T>
struct ThresholdRule {
  T threshold = T(0.5);

  mole::Index max_per_token(mole::Index experts) const noexcept { return experts; }

  void forward(std::span<const T> logits, std::span<T> prob, std::span<T> gate) const noexcept {
    for (std::size_t e = 0; e < logits.size(); ++e) {
      prob[e] = mole::math::sigmoid(logits[e]);
      gate[e] = prob[e] > threshold ? prob[e] - threshold : T(0);
    }
  }

  void backward(std::span<const T>, std::span<const T> prob, std::span<const T> gate,
                std::span<const T> dgate, std::span<const T> dprob,
                std::span<T> dlogits) const noexcept {
    for (std::size_t e = 0; e < prob.size(); ++e) {
      const T dscore = (gate[e] > T(0) ? dgate[e] : T(0)) + dprob[e];
      dlogits[e] = std::fma(dscore, prob[e] * (T(1) - prob[e]), dlogits[e]);
    }
  }
};

template <class T>
using ThresholdRouter = mole::RuleRouter<T, ThresholdRule<T>>;

static_assert(mole::Router<ThresholdRouter<float>>);

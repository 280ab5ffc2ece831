// SPDX-License-Identifier: Apache-2.0
// LearnedThresholdRouter: every expert above a threshold that the token has learned to ask for.
//
//   p = softmax(x Wᵀ + b (+ overrides))      τ = max_threshold · σ(x wᵀ + c)
//   a = p - τ      S = { a >= 0 }            g = a / Σ_S a
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts], w [1, width], c [1, 1]. A sum of 0
// divides by 1: an expert exactly at the threshold is selected, counted, and has the gate 0. A
// token may have no expert; with max_threshold <= 1 / experts it always has one. The selection is a
// constant in backward. The tape holds the logit of the threshold, in `side`.
//
// Liu and Luo, "AdaMoLE", 2024: max_threshold is 1 / experts by default.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/kernels/math.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct LearnedThresholdRule {
  T max_threshold = T(0);

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index experts) const noexcept { return experts; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;

  /// τ of a threshold logit, and its slope. A logit that is not a number gives an infinite τ: no
  /// expert.
  T threshold(T logit) const noexcept;
  T threshold_slope(T logit) const noexcept;
};

template <class T>
class LearnedThresholdRouter : public HeadRouter<T, LinearPairHead<T>, LearnedThresholdRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    T max_threshold = T(0);      ///< 0: 1 / experts
    bool bias = false;           ///< the router has a bias parameter
    bool threshold_bias = true;  ///< the threshold has one

    static constexpr std::string_view kind() noexcept { return "learned_threshold"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"max_threshold"}, c.max_threshold...);
      f(Field{"bias"}, c.bias...);
      f(Field{"threshold_bias"}, c.threshold_bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit LearnedThresholdRouter(const Config& config)
      : HeadRouter<T, LinearPairHead<T>, LearnedThresholdRule<T>>(
            {linear_head<T>("LearnedThresholdRouter", config.width, config.experts, config.bias)
                 .linear,
             {config.width, 1, config.threshold_bias}},
            {config.max_threshold == T(0) ? T(1) / static_cast<T>(config.experts)
                                          : config.max_threshold}),
        config_(config) {
    require_from_zero("LearnedThresholdRouter", "max_threshold", config.max_threshold);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
T LearnedThresholdRule<T>::threshold(T logit) const noexcept {
  if (std::isnan(logit)) return std::numeric_limits<T>::infinity();
  return max_threshold * math::sigmoid<T>(logit);
}

template <class T>
T LearnedThresholdRule<T>::threshold_slope(T logit) const noexcept {
  if (!std::isfinite(logit)) return T(0);
  return max_threshold * math::sigmoid<T>(logit) * math::sigmoid<T>(-logit);
}

template <class T>
Index LearnedThresholdRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  const T tau = threshold(row.side[0]);
  Index count = 0;
  T sum = T(0);
  for (std::size_t e = 0; e < row.prob.size(); ++e) {
    const T above = row.prob[e] - tau;
    if (row.logits[e] == -std::numeric_limits<T>::infinity() || !(above >= T(0))) continue;
    row.chosen[count] = static_cast<std::int32_t>(e);
    row.gate[count++] = above;
    sum += above;
  }
  for (T& gate : row.gate.first(count)) gate /= sum == T(0) ? T(1) : sum;
  return count;
}

template <class T>
void LearnedThresholdRule<T>::backward(const RuleRow<T>& row, None,
                                       const RuleRowGradient<T>& d) const noexcept {
  const std::span<T> dprob = row.work;
  std::fill(dprob.begin(), dprob.end(), T(0));
  const T tau = threshold(row.side[0]);
  T sum = T(0), dabove = T(0);
  for (const std::int32_t e : row.chosen) sum += row.prob[e] - tau;
  stages::shares_backward<T>(row.chosen, row.gate, d.dgate, sum, dprob);
  for (const std::int32_t e : row.chosen) dabove += dprob[e];
  d.dside[0] = std::fma(-dabove, threshold_slope(row.side[0]), d.dside[0]);
  for (std::size_t e = 0; e < dprob.size(); ++e) dprob[e] += d.dprob[e];
  stages::softmax_backward<T>(row.prob, dprob, d.dlogits);
}

#ifndef MOLE_HEADER_ONLY
extern template struct LearnedThresholdRule<float>;
extern template struct LearnedThresholdRule<double>;
extern template class HeadRouter<float, LinearPairHead<float>, LearnedThresholdRule<float>>;
extern template class HeadRouter<double, LinearPairHead<double>, LearnedThresholdRule<double>>;
#endif

static_assert(Router<LearnedThresholdRouter<float>>);
static_assert(Router<LearnedThresholdRouter<double>>);

}  // namespace mole::inline MOLE_ABI

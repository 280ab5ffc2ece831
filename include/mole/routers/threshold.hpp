// SPDX-License-Identifier: Apache-2.0
// ThresholdRouter: every expert above a threshold.
//
//   p = softmax(x Wᵀ + b (+ overrides))      S = { p >= threshold }      g = p / Σ_S p
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. A sum of 0 divides by 1. A token
// may have no expert. The selection is a constant in backward.
//
// The baseline of Liu and Luo, "AdaMoLE", 2024.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct ThresholdRule {
  T threshold = T(0);

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index experts) const noexcept { return experts; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class ThresholdRouter : public HeadRouter<T, LinearHead<T>, ThresholdRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    T threshold = T(0.25);
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "threshold"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"threshold"}, c.threshold...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit ThresholdRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, ThresholdRule<T>>(
            linear_head<T>("ThresholdRouter", config.width, config.experts, config.bias),
            {config.threshold}),
        config_(config) {
    require_finite("ThresholdRouter", "threshold", config.threshold);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index ThresholdRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  Index count = 0;
  T sum = T(0);
  for (std::size_t e = 0; e < row.prob.size(); ++e) {
    if (row.logits[e] == -std::numeric_limits<T>::infinity() || !(row.prob[e] >= threshold)) {
      continue;
    }
    row.chosen[count] = static_cast<std::int32_t>(e);
    row.gate[count++] = row.prob[e];
    sum += row.prob[e];
  }
  for (T& gate : row.gate.first(count)) gate /= sum == T(0) ? T(1) : sum;
  return count;
}

template <class T>
void ThresholdRule<T>::backward(const RuleRow<T>& row, None,
                                const RuleRowGradient<T>& d) const noexcept {
  std::copy(d.dprob.begin(), d.dprob.end(), row.work.begin());
  T sum = T(0);
  for (const std::int32_t e : row.chosen) sum += row.prob[e];
  stages::shares_backward<T>(row.chosen, row.gate, d.dgate, sum, row.work);
  stages::softmax_backward<T>(row.prob, row.work, d.dlogits);
}

#ifndef MOLE_HEADER_ONLY
extern template struct ThresholdRule<float>;
extern template struct ThresholdRule<double>;
extern template class HeadRouter<float, LinearHead<float>, ThresholdRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, ThresholdRule<double>>;
#endif

static_assert(Router<ThresholdRouter<float>>);
static_assert(Router<ThresholdRouter<double>>);

}  // namespace mole::inline MOLE_ABI

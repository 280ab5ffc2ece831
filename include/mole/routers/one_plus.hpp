// SPDX-License-Identifier: Apache-2.0
// OnePlusRouter: starts as the plain sum of the experts it selects.
//
//   l = x Wᵀ + b (+ overrides)    p = softmax(l)    S = the k largest l, ties to the lower expert
//   g = 1 + l on S: with W = 0 every gate is 1
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. The selection is a constant in
// backward.
//
// He et al., "Understanding and Harnessing Sparsity in Unified Multimodal Models", 2025.
#pragma once

#include <cmath>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct OnePlusRule {
  Index k = 1;

  Index max_per_token(Index) const noexcept { return k; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class OnePlusRouter : public HeadRouter<T, LinearHead<T>, OnePlusRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 2;        ///< 1 ... experts
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "one_plus"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit OnePlusRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, OnePlusRule<T>>(
            linear_head<T>("OnePlusRouter", config.width, config.experts, config.bias), {config.k}),
        config_(config) {
    require_k("OnePlusRouter", config.k, config.experts);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index OnePlusRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  const Index count = stages::select_top_k<T>(row.logits, row.chosen.first(k));
  for (Index i = 0; i < count; ++i) {
    const T logit = row.logits[row.chosen[i]];
    row.gate[i] = std::isfinite(logit) ? T(1) + logit : row.prob[row.chosen[i]];
  }
  return count;
}

template <class T>
void OnePlusRule<T>::backward(const RuleRow<T>& row, None,
                              const RuleRowGradient<T>& d) const noexcept {
  for (std::size_t i = 0; i < row.chosen.size(); ++i) d.dlogits[row.chosen[i]] += d.dgate[i];
  stages::softmax_backward<T>(row.prob, d.dprob, d.dlogits);
}

#ifndef MOLE_HEADER_ONLY
extern template struct OnePlusRule<float>;
extern template struct OnePlusRule<double>;
extern template class HeadRouter<float, LinearHead<float>, OnePlusRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, OnePlusRule<double>>;
#endif

static_assert(Router<OnePlusRouter<float>>);
static_assert(Router<OnePlusRouter<double>>);

}  // namespace mole::inline MOLE_ABI

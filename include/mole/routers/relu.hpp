// SPDX-License-Identifier: Apache-2.0
// ReluRouter: the experts with a positive logit, weighted by it. How many they are is learned.
//
//   l = x Wᵀ + b (+ overrides)      g = max(l, 0)      S = the experts with l > 0
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. The scores of the tape are
// max(l, 0), so that the sparsity loss (losses/sparsity.hpp) reads them.
//
// Wang et al., "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing", 2024.
#pragma once

#include <cstdint>
#include <limits>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct ReluRule {
  Index max_per_token(Index experts) const noexcept { return experts; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class ReluRouter : public HeadRouter<T, LinearHead<T>, ReluRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "relu"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit ReluRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, ReluRule<T>>(
            linear_head<T>("ReluRouter", config.width, config.experts, config.bias), {}),
        config_(config) {}

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index ReluRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  Index count = 0;
  const bool infinite = stages::split_infinite<T>(row.logits, row.prob);
  for (std::size_t e = 0; e < row.logits.size(); ++e) {
    if (!infinite) row.prob[e] = row.logits[e] > T(0) ? row.logits[e] : T(0);
    if (!(row.prob[e] > T(0))) continue;
    row.chosen[count] = static_cast<std::int32_t>(e);
    row.gate[count++] = row.logits[e] == kInfinity ? row.prob[e] : row.logits[e];
  }
  return count;
}

template <class T>
void ReluRule<T>::backward(const RuleRow<T>& row, None,
                           const RuleRowGradient<T>& d) const noexcept {
  for (std::size_t i = 0; i < row.chosen.size(); ++i) d.dlogits[row.chosen[i]] += d.dgate[i];
  for (std::size_t e = 0; e < row.prob.size(); ++e) {
    if (row.prob[e] > T(0)) d.dlogits[e] += d.dprob[e];
  }
}

#ifndef MOLE_HEADER_ONLY
extern template struct ReluRule<float>;
extern template struct ReluRule<double>;
extern template class HeadRouter<float, LinearHead<float>, ReluRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, ReluRule<double>>;
#endif

static_assert(Router<ReluRouter<float>>);
static_assert(Router<ReluRouter<double>>);

}  // namespace mole::inline MOLE_ABI

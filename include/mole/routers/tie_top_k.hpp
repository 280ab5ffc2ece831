// SPDX-License-Identifier: Apache-2.0
// TieTopKRouter: top-k in which equals of the k-th stay.
//
//   l = x Wᵀ + b (+ overrides)      p = softmax(l)
//   S = every l that is not below the k-th largest      g = softmax of l over S
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. k = 0 keeps every expert. With
// ties a token has more than k experts, so max_per_token is the number of experts. The selection is
// a constant in backward.
//
// The gate of MoFME's released code (Zhang et al., AAAI 2024).
#pragma once

#include <limits>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct TieTopKRule {
  Index k = 0;

  static constexpr Index kWorkRows = 1;
  static constexpr Weighting<T> weighting() noexcept {
    return {Score::softmax, true, false, T(0), T(1)};
  }
  Index max_per_token(Index experts) const noexcept { return experts; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class TieTopKRouter : public HeadRouter<T, LinearHead<T>, TieTopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 0;        ///< 0 ... experts, 0: all
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "tie_top_k"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit TieTopKRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, TieTopKRule<T>>(
            linear_head<T>("TieTopKRouter", config.width, config.experts, config.bias), {config.k}),
        config_(config) {
    require_field(config.k >= 0 && config.k <= config.experts, "TieTopKRouter", "k",
                  "0 ... experts", config.k);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index TieTopKRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  stages::score<T>(Score::softmax, row.logits, row.prob);
  T least = kNever;
  if (k > 0) {
    const Index found = stages::select_top_k<T>(row.logits, row.chosen.first(k));
    if (found > 0) least = row.logits[row.chosen[found - 1]];
  }
  Index count = 0;
  for (std::size_t e = 0; e < row.logits.size(); ++e) {
    if (!(row.logits[e] > kNever) || !(row.logits[e] >= least)) continue;
    row.chosen[count++] = static_cast<std::int32_t>(e);
  }
  stages::weigh<T>(weighting(), row.logits, row.prob, row.chosen.first(count),
                   row.gate.first(count));
  return count;
}

template <class T>
void TieTopKRule<T>::backward(const RuleRow<T>& row, None,
                              const RuleRowGradient<T>& d) const noexcept {
  weighted_scores_backward(weighting(), row, d);
}

#ifndef MOLE_HEADER_ONLY
extern template struct TieTopKRule<float>;
extern template struct TieTopKRule<double>;
extern template class HeadRouter<float, LinearHead<float>, TieTopKRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, TieTopKRule<double>>;
#endif

static_assert(Router<TieTopKRouter<float>>);
static_assert(Router<TieTopKRouter<double>>);

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// TopPRouter: every token takes as many experts as it needs to be confident.
//
//   p = softmax(x Wᵀ + b (+ overrides))      q = p / temperature
//   experts by falling q, ties to the lower one, C_i = q_0 + ... + q_i
//   expert i of that order stays while C_(i-1) <= top_p    (include_crossing)
//                                or C_i <= top_p           (without)
//   at least min_experts, at most max_experts
//   g = q on S, or q / Σ_S q with renormalise
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. The selection is a constant in
// backward. At equality one expert more stays.
//
// Huang et al., "Harder Tasks Need More Experts", 2024: the crossing expert stays, no
// renormalisation. The temperature divides the probabilities, not the logits, as in their code.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct TopPRule {
  stages::Mass<T> mass;
  T temperature = T(1);
  bool renormalise = false;

  Index max_per_token(Index experts) const noexcept {
    return mass.at_most > 0 ? std::min(mass.at_most, experts) : experts;
  }
  static constexpr Index kWorkRows = 1;
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;

  Weighting<T> weighting() const noexcept {
    return {Score::softmax, false, renormalise, T(0), renormalise ? T(1) : T(1) / temperature};
  }
};

template <class T>
class TopPRouter : public HeadRouter<T, LinearHead<T>, TopPRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    T top_p = T(0.4);
    bool include_crossing = true;
    Index min_experts = 1;
    Index max_experts = 0;  ///< 0: all
    T temperature = T(1);   ///< divides the probabilities
    bool renormalise = false;
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "top_p"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"top_p"}, c.top_p...);
      f(Field{"include_crossing"}, c.include_crossing...);
      f(Field{"min_experts"}, c.min_experts...);
      f(Field{"max_experts"}, c.max_experts...);
      f(Field{"temperature"}, c.temperature...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit TopPRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, TopPRule<T>>(
            linear_head<T>("TopPRouter", config.width, config.experts, config.bias),
            {{config.top_p, config.include_crossing, config.min_experts, config.max_experts},
             config.temperature,
             config.renormalise}),
        config_(config) {
    constexpr const char* kName = "TopPRouter";
    require_from_zero(kName, "top_p", config.top_p);
    require_field(config.min_experts >= 0 && config.min_experts <= config.experts, kName,
                  "min_experts", "0 ... experts", config.min_experts);
    require_field(
        config.max_experts == 0 || (config.max_experts >= std::max<Index>(config.min_experts, 1) &&
                                    config.max_experts <= config.experts),
        kName, "max_experts", "min_experts ... experts, or 0", config.max_experts);
    require_positive(kName, "temperature", config.temperature);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index TopPRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  const std::span<T> share = row.work;
  for (std::size_t e = 0; e < share.size(); ++e) share[e] = row.prob[e] / temperature;
  const Index count = stages::select_mass<T>(mass, row.logits, share, row.order);
  std::copy_n(row.order.begin(), count, row.chosen.begin());
  stages::weigh<T>(weighting(), row.logits, row.prob, row.chosen.first(count),
                   row.gate.first(count));
  return count;
}

template <class T>
void TopPRule<T>::backward(const RuleRow<T>& row, None,
                           const RuleRowGradient<T>& d) const noexcept {
  weighted_scores_backward(weighting(), row, d);
}

#ifndef MOLE_HEADER_ONLY
extern template struct TopPRule<float>;
extern template struct TopPRule<double>;
extern template class HeadRouter<float, LinearHead<float>, TopPRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, TopPRule<double>>;
#endif

static_assert(Router<TopPRouter<float>>);
static_assert(Router<TopPRouter<double>>);

}  // namespace mole::inline MOLE_ABI

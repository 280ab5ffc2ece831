// SPDX-License-Identifier: Apache-2.0
// TsallisRouter: top-p for decided tokens, every expert for undecided ones.
//
//   p = softmax(x Wᵀ + b (+ overrides))      H = entropy(p), of Tsallis' kind with index q
//   H > entropy_threshold: S = all experts
//   else, by falling p, ties to the lower one, C_i = p_0 + ... + p_i:
//         expert i of that order stays while C_i <= top_p, at least keep_top_k stay
//   g = p on S
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. Selection and switch are constants
// in backward; a loss on the entropy (losses/entropy.hpp) trains it. A threshold of 1 or an index
// of 0 turns the switch off.
//
// Li et al., "DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing
// Mechanism", 2025; the crossing expert is left out and gates are not renormalised, as in the code.
#pragma once

#include <cmath>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct TsallisRule {
  stages::Mass<T> mass;
  Entropy<T> entropy;
  T threshold = T(0.9);

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index experts) const noexcept { return experts; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class TsallisRouter : public HeadRouter<T, LinearHead<T>, TsallisRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    T top_p = T(0.75);
    Index keep_top_k = 2;  ///< 0 ... experts
    EntropyKind entropy = EntropyKind::tsallis;
    T entropy_index = T(1.1);  ///< q; 1 is Shannon's entropy, 0 turns the switch off
    T entropy_threshold = T(0.9);
    T entropy_epsilon = T(1e-5);
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "tsallis"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"top_p"}, c.top_p...);
      f(Field{"keep_top_k"}, c.keep_top_k...);
      f(Field{"entropy"}, c.entropy...);
      f(Field{"entropy_index"}, c.entropy_index...);
      f(Field{"entropy_threshold"}, c.entropy_threshold...);
      f(Field{"entropy_epsilon"}, c.entropy_epsilon...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit TsallisRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, TsallisRule<T>>(
            linear_head<T>("TsallisRouter", config.width, config.experts, config.bias),
            {{config.top_p, false, config.keep_top_k, 0},
             {config.entropy, config.entropy_index, config.entropy_epsilon, true},
             config.entropy_threshold}),
        config_(config) {
    constexpr const char* kName = "TsallisRouter";
    require_from_zero(kName, "top_p", config.top_p);
    require_field(config.keep_top_k >= 0 && config.keep_top_k <= config.experts, kName,
                  "keep_top_k", "0 ... experts", config.keep_top_k);
    require_from_zero(kName, "entropy_index", config.entropy_index);
    require_from_zero(kName, "entropy_epsilon", config.entropy_epsilon);
    require_field(!std::isnan(config.entropy_threshold), kName, "entropy_threshold", "a number",
                  config.entropy_threshold);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index TsallisRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  const bool undecided =
      entropy.index > T(0) && threshold < T(1) && stages::entropy<T>(entropy, row.prob) > threshold;
  const Index count = undecided ? stages::sort_keys<T>(row.logits, row.order)
                                : stages::select_mass<T>(mass, row.logits, row.prob, row.order);
  for (Index i = 0; i < count; ++i) {
    row.chosen[i] = row.order[i];
    row.gate[i] = row.prob[row.order[i]];
  }
  return count;
}

template <class T>
void TsallisRule<T>::backward(const RuleRow<T>& row, None,
                              const RuleRowGradient<T>& d) const noexcept {
  std::copy(d.dprob.begin(), d.dprob.end(), row.work.begin());
  for (std::size_t i = 0; i < row.chosen.size(); ++i) row.work[row.chosen[i]] += d.dgate[i];
  stages::softmax_backward<T>(row.prob, row.work, d.dlogits);
}

#ifndef MOLE_HEADER_ONLY
extern template struct TsallisRule<float>;
extern template struct TsallisRule<double>;
extern template class HeadRouter<float, LinearHead<float>, TsallisRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, TsallisRule<double>>;
#endif

static_assert(Router<TsallisRouter<float>>);
static_assert(Router<TsallisRouter<double>>);

}  // namespace mole::inline MOLE_ABI

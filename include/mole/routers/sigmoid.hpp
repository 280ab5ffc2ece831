// SPDX-License-Identifier: Apache-2.0
// SigmoidRouter: every expert works, each with a score of its own.
//
//   l = x Wᵀ + b (+ overrides)      g = scale · σ(l), or scale · σ(l) / (Σ σ + renorm_epsilon)
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts].
#pragma once

#include <cstdint>
#include <limits>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct SigmoidRule {
  Weighting<T> weighting;

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index experts) const noexcept { return experts; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class SigmoidRouter : public HeadRouter<T, LinearHead<T>, SigmoidRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    bool renormalise = false;
    T renorm_epsilon = T(1e-20);
    T scale = T(1);
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "sigmoid"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"renorm_epsilon"}, c.renorm_epsilon...);
      f(Field{"scale"}, c.scale...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit SigmoidRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, SigmoidRule<T>>(
            linear_head<T>("SigmoidRouter", config.width, config.experts, config.bias),
            {{Score::sigmoid, false, config.renormalise, config.renorm_epsilon, config.scale}}),
        config_(config) {
    require_from_zero("SigmoidRouter", "renorm_epsilon", config.renorm_epsilon);
    require_finite("SigmoidRouter", "scale", config.scale);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index SigmoidRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::score<T>(Score::sigmoid, row.logits, row.prob);
  Index count = 0;
  for (std::size_t e = 0; e < row.logits.size(); ++e) {
    if (row.logits[e] == -std::numeric_limits<T>::infinity()) continue;
    row.chosen[count++] = static_cast<std::int32_t>(e);
  }
  stages::weigh<T>(weighting, row.logits, row.prob, row.chosen.first(count), row.gate.first(count));
  return count;
}

template <class T>
void SigmoidRule<T>::backward(const RuleRow<T>& row, None,
                              const RuleRowGradient<T>& d) const noexcept {
  weighted_scores_backward(weighting, row, d);
}

#ifndef MOLE_HEADER_ONLY
extern template struct SigmoidRule<float>;
extern template struct SigmoidRule<double>;
extern template class HeadRouter<float, LinearHead<float>, SigmoidRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, SigmoidRule<double>>;
#endif

static_assert(Router<SigmoidRouter<float>>);
static_assert(Router<SigmoidRouter<double>>);

}  // namespace mole::inline MOLE_ABI

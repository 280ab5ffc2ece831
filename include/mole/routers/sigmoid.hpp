// SPDX-License-Identifier: Apache-2.0
// Routers that score every expert on its own.
//
//   SigmoidRouter   g = scale · σ(l), or scale · σ(l) / (Σ σ + renorm_epsilon)    every expert
//   ReluRouter      g = max(l, 0)                                                 experts with l >
//   0
//
//   l = x Wᵀ + b (+ overrides)
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. For the ReluRouter the scores of
// the tape are max(l, 0), so that its sparsity loss (losses/sparsity.hpp) reads them.
//
// Wang et al., "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing", 2024.
#pragma once

#include <cmath>

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
    require_field(config.renorm_epsilon >= T(0) && std::isfinite(config.renorm_epsilon),
                  "SigmoidRouter", "renorm_epsilon", "a number from 0 up", config.renorm_epsilon);
    require_field(std::isfinite(config.scale), "SigmoidRouter", "scale", "a finite number",
                  config.scale);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

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
extern template struct SigmoidRule<float>;
extern template struct SigmoidRule<double>;
extern template struct ReluRule<float>;
extern template struct ReluRule<double>;
extern template class HeadRouter<float, LinearHead<float>, SigmoidRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, SigmoidRule<double>>;
extern template class HeadRouter<float, LinearHead<float>, ReluRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, ReluRule<double>>;
#endif

static_assert(Router<SigmoidRouter<float>>);
static_assert(Router<SigmoidRouter<double>>);
static_assert(Router<ReluRouter<float>>);
static_assert(Router<ReluRouter<double>>);

}  // namespace mole::inline MOLE_ABI

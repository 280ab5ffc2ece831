// SPDX-License-Identifier: Apache-2.0
// MlpRouter: top-k of the logits of a small network.
//
//   h = act(x W1ᵀ + b1), again with W2 if hidden2 > 0     l = h Wᵀ + b (+ overrides)
//   u = l / temperature     S = the k largest, ties to the lower expert
//   g = softmax(u) on S, divided by its sum with renormalise
//
// Shapes: x [tokens, width], W1 [hidden, width], W2 [hidden2, hidden], W [experts, last hidden].
// The selection is a constant in backward.
//
// Aspis et al., "DriftMoE: A Mixture of Experts Approach to Handle Concept Drifts", 2025: two
// hidden maps, relu and temperature 0.8; it learns from correctness_loss (losses/supervised.hpp) on
// the logits, not from the gates.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/mlp_head.hpp"
#include "mole/routing/top_k_rule.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class MlpRouter : public HeadRouter<T, MlpHead<T>, TopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index hidden = 256;
    Index hidden2 = 0;  ///< 0: one hidden map
    Index k = 2;        ///< 1 ... experts
    HeadActivation activation = HeadActivation::relu;
    bool renormalise = true;
    T temperature = T(1);
    bool bias = true;  ///< every map has a bias

    static constexpr std::string_view kind() noexcept { return "mlp"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("hidden"), c.hidden...);
      f(Field{"hidden2"}, c.hidden2...);
      f(Field::required("k"), c.k...);
      f(Field{"activation"}, c.activation...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"temperature"}, c.temperature...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit MlpRouter(const Config& config)
      : HeadRouter<T, MlpHead<T>, TopKRule<T>>(
            mlp_head<T>("MlpRouter", config.width, config.experts, config.hidden, config.hidden2,
                        config.activation, config.bias),
            softmax_top_k<T>("MlpRouter", config.experts, config.k, config.renormalise,
                             config.temperature)),
        config_(config) {}

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

#ifndef MOLE_HEADER_ONLY
extern template class HeadRouter<float, MlpHead<float>, TopKRule<float>>;
extern template class HeadRouter<double, MlpHead<double>, TopKRule<double>>;
#endif

static_assert(Router<MlpRouter<float>>);
static_assert(Router<MlpRouter<double>>);

}  // namespace mole::inline MOLE_ABI

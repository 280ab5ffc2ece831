// SPDX-License-Identifier: Apache-2.0
// ScoredHashRouter: the token's id says which experts, x how much each of them.
//
//   S = row `id` of a table [ids, k], or, without a table, the one expert id mod experts
//   l = x Wᵀ + b (+ overrides)    s = σ(l) or √softplus(l)    g = scale · s / (Σ_S s + epsilon)
//
// Shapes: x [tokens, width], W [experts, width], ids [tokens], table [ids, k]. Who has no slot:
// hash_rule.hpp.
//
// DeepSeek-V4's scores on the map of Roller et al., "Hash Layers for Large Sparse Models", 2021.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/hash_rule.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class ScoredHashRouter : public HeadRouter<T, LinearHead<T>, HashRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 1;  ///< 1 ... experts; 1 without a table
    Score score = Score::sqrt_softplus;
    T renorm_epsilon = T(1e-20);
    T scale = T(1);
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "scored_hash"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"score"}, c.score...);
      f(Field{"renorm_epsilon"}, c.renorm_epsilon...);
      f(Field{"scale"}, c.scale...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit ScoredHashRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, HashRule<T>>(
            linear_head<T>("ScoredHashRouter", config.width, config.experts, config.bias),
            {config.k, true, {config.score, false, true, config.renorm_epsilon, config.scale}}),
        config_(config) {
    require_k("ScoredHashRouter", config.k, config.experts);
    require_from_zero("ScoredHashRouter", "renorm_epsilon", config.renorm_epsilon);
    require_finite("ScoredHashRouter", "scale", config.scale);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

#ifndef MOLE_HEADER_ONLY
extern template class HeadRouter<float, LinearHead<float>, HashRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, HashRule<double>>;
#endif

static_assert(Router<ScoredHashRouter<float>>);
static_assert(Router<ScoredHashRouter<double>>);

}  // namespace mole::inline MOLE_ABI

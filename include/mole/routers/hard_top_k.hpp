// SPDX-License-Identifier: Apache-2.0
// Routers whose selected experts all work with weight 1.
//
//   l = x Wᵀ + b (+ overrides)    p = softmax(l)    S = the k largest l, ties to the lower expert
//
//   HardTopKRouter           g = 1 on S. The gates are constants: W learns from losses only.
//   StraightThroughRouter    g = 1 on S; backward passes the gradient of g to p on S, or to
//                            p / Σ_S p with renormalise; with probes to p of every expert
//   OnePlusRouter            g = 1 + l on S: with W = 0 it starts as the plain sum of the experts
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. The selection is a constant in
// backward.
//
// HardTopKRouter with k = 1 is LLaVA-MoLE's router (Chen et al., 2024). StraightThroughRouter and
// OnePlusRouter: He et al., "Understanding and Harnessing Sparsity in Unified Multimodal Models",
// 2025, whose straight-through mask passes the gradient to the selected.
#pragma once

#include <cmath>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct HardTopKRule {
  Index k = 1;

  Index max_per_token(Index) const noexcept { return k; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
struct StraightThroughRule {
  Index k = 1;
  bool renormalise = false, probes = false;

  static constexpr Index kWorkRows = 1;
  static constexpr GradientKind gradient = GradientKind::straight_through;
  Index max_per_token(Index experts) const noexcept { return probes ? experts : k; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
struct OnePlusRule {
  Index k = 1;

  Index max_per_token(Index) const noexcept { return k; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class HardTopKRouter : public HeadRouter<T, LinearHead<T>, HardTopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 1;        ///< 1 ... experts
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "hard_top_k"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit HardTopKRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, HardTopKRule<T>>(
            linear_head<T>("HardTopKRouter", config.width, config.experts, config.bias),
            {config.k}),
        config_(config) {
    require_field(config.k >= 1 && config.k <= config.experts, "HardTopKRouter", "k",
                  "1 ... experts", config.k);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
class StraightThroughRouter : public HeadRouter<T, LinearHead<T>, StraightThroughRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 1;  ///< 1 ... experts
    bool renormalise = false;
    bool probes = false;  ///< experts not selected become probe slots
    bool bias = false;    ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "straight_through"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"probes"}, c.probes...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit StraightThroughRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, StraightThroughRule<T>>(
            linear_head<T>("StraightThroughRouter", config.width, config.experts, config.bias),
            {config.k, config.renormalise, config.probes}),
        config_(config) {
    require_field(config.k >= 1 && config.k <= config.experts, "StraightThroughRouter", "k",
                  "1 ... experts", config.k);
    require_field(!(config.renormalise && config.probes), "StraightThroughRouter", "renormalise",
                  "false with probes", config.renormalise);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
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
    require_field(config.k >= 1 && config.k <= config.experts, "OnePlusRouter", "k",
                  "1 ... experts", config.k);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index HardTopKRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  const Index count = stages::select_top_k<T>(row.logits, row.chosen.first(k));
  std::fill_n(row.gate.begin(), count, T(1));
  return count;
}

template <class T>
void HardTopKRule<T>::backward(const RuleRow<T>& row, None,
                               const RuleRowGradient<T>& d) const noexcept {
  stages::softmax_backward<T>(row.prob, d.dprob, d.dlogits);
}

template <class T>
Index StraightThroughRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  const Index count = stages::select_top_k<T>(row.logits, row.chosen.first(k));
  std::fill_n(row.gate.begin(), count, T(1));
  if (!probes) return count;
  const auto end = row.chosen.begin() + count;
  Index slots = count;
  for (std::size_t e = 0; e < row.logits.size(); ++e) {
    const auto id = static_cast<std::int32_t>(e);
    if (row.logits[e] == -std::numeric_limits<T>::infinity()) continue;
    if (std::find(row.chosen.begin(), end, id) != end) continue;
    row.gate[slots] = T(0);
    row.chosen[slots++] = id;
  }
  return slots;
}

template <class T>
void StraightThroughRule<T>::backward(const RuleRow<T>& row, None,
                                      const RuleRowGradient<T>& d) const noexcept {
  weighted_scores_backward({Score::softmax, false, renormalise, T(0), T(1)}, row, d);
}

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
extern template struct HardTopKRule<float>;
extern template struct HardTopKRule<double>;
extern template struct StraightThroughRule<float>;
extern template struct StraightThroughRule<double>;
extern template struct OnePlusRule<float>;
extern template struct OnePlusRule<double>;
extern template class HeadRouter<float, LinearHead<float>, HardTopKRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, HardTopKRule<double>>;
extern template class HeadRouter<float, LinearHead<float>, StraightThroughRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, StraightThroughRule<double>>;
extern template class HeadRouter<float, LinearHead<float>, OnePlusRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, OnePlusRule<double>>;
#endif

static_assert(Router<HardTopKRouter<float>>);
static_assert(Router<HardTopKRouter<double>>);
static_assert(Router<StraightThroughRouter<float>>);
static_assert(Router<StraightThroughRouter<double>>);
static_assert(Router<OnePlusRouter<float>>);
static_assert(Router<OnePlusRouter<double>>);

}  // namespace mole::inline MOLE_ABI

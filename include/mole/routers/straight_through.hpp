// SPDX-License-Identifier: Apache-2.0
// StraightThroughRouter: the k best experts, all with weight 1, and a gradient all the same.
//
//   l = x Wᵀ + b (+ overrides)    p = softmax(l)    S = the k largest l, ties to the lower expert
//   g = 1 on S; backward passes the gradient of g to p on S, or to p / Σ_S p with renormalise; with
//   probes to p of every expert
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. The selection is a constant in
// backward.
//
// He et al., "Understanding and Harnessing Sparsity in Unified Multimodal Models", 2025, whose mask
// passes the gradient to the selected.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

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
    require_k("StraightThroughRouter", config.k, config.experts);
    require_field(!(config.renormalise && config.probes), "StraightThroughRouter", "renormalise",
                  "false with probes", config.renormalise);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

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

#ifndef MOLE_HEADER_ONLY
extern template struct StraightThroughRule<float>;
extern template struct StraightThroughRule<double>;
extern template class HeadRouter<float, LinearHead<float>, StraightThroughRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, StraightThroughRule<double>>;
#endif

static_assert(Router<StraightThroughRouter<float>>);
static_assert(Router<StraightThroughRouter<double>>);

}  // namespace mole::inline MOLE_ABI

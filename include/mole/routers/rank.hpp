// SPDX-License-Identifier: Apache-2.0
// RankRouter: the experts at given places of the order, not only the best.
//
//   p = softmax(x Wᵀ + b (+ overrides))     order: falling p, ties to the lower expert
//   S = the experts at `positions` (0 = the best), those that are available
//   with threshold >= 0: of these only the first, until their sum of p passes it; the one that
//   passes stays
//   g = p on S, divided by its sum with renormalise
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. The selection is a constant in
// backward. One position with renormalise has the gate 1 and no gradient. This is for inference
// that wants a weaker second answer, and for the study of what lower choices know.
//
// Shi et al., "Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by
// Self-Contrast", 2024.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct RankRule {
  std::vector<Index> positions;  ///< ascending
  T threshold = T(-1);
  Weighting<T> weighting;

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index) const noexcept { return static_cast<Index>(positions.size()); }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept {
    weighted_scores_backward(weighting, row, d);
  }
};

template <class T>
class RankRouter : public HeadRouter<T, LinearHead<T>, RankRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    std::vector<Index> positions = {0};  ///< distinct, 0 ... experts - 1
    bool renormalise = true;
    T threshold = T(-1);  ///< negative: all positions
    bool bias = false;    ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "rank"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("positions"), c.positions...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"threshold"}, c.threshold...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit RankRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, RankRule<T>>(
            linear_head<T>("RankRouter", config.width, config.experts, config.bias),
            {ascending(config),
             config.threshold,
             {Score::softmax, false, config.renormalise, T(0), T(1)}}),
        config_(config) {
    require_field(!std::isnan(config.threshold), "RankRouter", "threshold", "a number",
                  config.threshold);
  }

  const Config& config() const noexcept { return config_; }

 private:
  static std::vector<Index> ascending(const Config& config) {
    std::vector<Index> sorted = config.positions;
    std::sort(sorted.begin(), sorted.end());
    require_field(!sorted.empty(), "RankRouter", "positions", "at least one", 0);
    for (std::size_t i = 0; i < sorted.size(); ++i) {
      const bool good = sorted[i] >= 0 && sorted[i] < config.experts;
      require_field(good && (i == 0 || sorted[i] != sorted[i - 1]), "RankRouter", "positions",
                    "distinct numbers in 0 ... experts - 1", sorted[i]);
    }
    return sorted;
  }

  Config config_;
};

template <class T>
Index RankRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  const Index found = stages::sort_keys<T>(row.logits, row.order);
  Index count = 0;
  T sum = T(0);
  for (const Index at : positions) {
    if (at >= found || (threshold >= T(0) && sum > threshold)) break;
    row.chosen[count++] = row.order[at];
    sum += row.prob[row.order[at]];
  }
  stages::weigh<T>(weighting, row.logits, row.prob, row.chosen.first(count), row.gate.first(count));
  return count;
}

#ifndef MOLE_HEADER_ONLY
extern template struct RankRule<float>;
extern template struct RankRule<double>;
extern template class HeadRouter<float, LinearHead<float>, RankRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, RankRule<double>>;
#endif

static_assert(Router<RankRouter<float>>);
static_assert(Router<RankRouter<double>>);

}  // namespace mole::inline MOLE_ABI

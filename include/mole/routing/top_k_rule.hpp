// SPDX-License-Identifier: Apache-2.0
// The plain top-k rule, for routers whose logits come from another head than a linear one.
//
//   S = the k largest logits, ties to the lower expert      g: weight.hpp
#pragma once

#include "mole/core/config.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct TopKRule {
  Index k = 1;
  Weighting<T> weighting;

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index) const noexcept { return k; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
Index TopKRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::score<T>(weighting.score, row.logits, row.prob);
  const Index count = stages::select_top_k<T>(row.logits, row.chosen.first(k));
  stages::weigh<T>(weighting, row.logits, row.prob, row.chosen.first(count), row.gate.first(count));
  return count;
}

template <class T>
void TopKRule<T>::backward(const RuleRow<T>& row, None,
                           const RuleRowGradient<T>& d) const noexcept {
  weighted_scores_backward(weighting, row, d);
}

#ifndef MOLE_HEADER_ONLY
extern template struct TopKRule<float>;
extern template struct TopKRule<double>;
#endif

}  // namespace mole::inline MOLE_ABI

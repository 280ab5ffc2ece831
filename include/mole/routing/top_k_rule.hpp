// SPDX-License-Identifier: Apache-2.0
// The plain top-k rule, for routers whose logits come from another head than a linear one.
//
//   u = l / temperature     S = the k largest, ties to the lower expert     g: weight.hpp
#pragma once

#include "mole/core/config.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct TopKRule {
  Index k = 1;
  Weighting<T> weighting;
  T temperature = T(1);

  static constexpr Index kWorkRows = 3;
  Index max_per_token(Index) const noexcept { return k; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;

 private:
  std::span<const T> scaled(const RuleRow<T>& row) const noexcept;
};

/// The rule of a plain top-k with softmax. Throws invalid_argument, naming the field.
template <class T>
TopKRule<T> softmax_top_k(const char* router, Index experts, Index k, bool renormalise,
                          T temperature) {
  require_k(router, k, experts);
  require_positive(router, "temperature", temperature);
  return {k, {Score::softmax, false, renormalise, T(0), T(1)}, temperature};
}

template <class T>
std::span<const T> TopKRule<T>::scaled(const RuleRow<T>& row) const noexcept {
  if (temperature == T(1)) return row.logits;
  const std::span<T> u = row.work.last(row.logits.size());
  for (std::size_t e = 0; e < u.size(); ++e) u[e] = row.logits[e] / temperature;
  return u;
}

template <class T>
Index TopKRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  const std::span<const T> u = scaled(row);
  stages::score<T>(weighting.score, u, row.prob);
  const Index count = stages::select_top_k<T>(u, row.chosen.first(k));
  stages::weigh<T>(weighting, u, row.prob, row.chosen.first(count), row.gate.first(count));
  return count;
}

template <class T>
void TopKRule<T>::backward(const RuleRow<T>& row, None,
                           const RuleRowGradient<T>& d) const noexcept {
  if (temperature == T(1)) return weighted_scores_backward(weighting, row, d);
  const std::size_t experts = row.logits.size();
  const std::span<T> du = row.work.subspan(experts, experts);
  std::fill(du.begin(), du.end(), T(0));
  RuleRow<T> at = row;
  at.logits = scaled(row);
  weighted_scores_backward(weighting, at, {d.dgate, d.dprob, du, {}});
  for (std::size_t e = 0; e < experts; ++e) d.dlogits[e] += du[e] / temperature;
}

#ifndef MOLE_HEADER_ONLY
extern template struct TopKRule<float>;
extern template struct TopKRule<double>;
#endif

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// What likeness to prototypes decides: the scores and gates of prototype routers.
//
//   weight                   gate                    prob, what losses see
//   cosine                   l, may be negative      softmax(l)
//   sigmoid                  σ(l)                    softmax(σ(l))
//   softmax                  softmax(l)              softmax(l)
//   softmax_of_selected      softmax of l over S     softmax(l)
//   unit                     1                       softmax(l)
//
// PrototypeRule selects the k largest l, ties to the lower expert. The unconditional expert has
// gate 1 and no gradient.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/prototype_head.hpp"

namespace mole::inline MOLE_ABI {

enum class PrototypeWeight { cosine, sigmoid, softmax, softmax_of_selected, unit };
constexpr std::array<std::string_view, 5> enum_names(PrototypeWeight) noexcept {
  return {"cosine", "sigmoid", "softmax", "softmax_of_selected", "unit"};
}

template <class T>
struct PrototypeRule {
  Index k = 1;
  PrototypeWeight weight = PrototypeWeight::cosine;
  bool has_unconditional = false;  ///< the last expert

  static constexpr Index kWorkRows = 2;
  Index max_per_token(Index) const noexcept { return k; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;

  /// The scores of a row. `work` [experts] is overwritten.
  void score(std::span<const T> logits, std::span<T> prob, std::span<T> work) const noexcept;
  /// The gates of the experts chosen.
  void weigh(const RuleRow<T>& row, std::span<const std::int32_t> chosen,
             std::span<T> gate) const noexcept;
  bool is_unconditional(std::span<const T> logits) const noexcept {
    return has_unconditional && logits.back() != -std::numeric_limits<T>::infinity();
  }
  static bool is_infinite(std::span<const T> logits) noexcept {
    return std::find(logits.begin(), logits.end(), std::numeric_limits<T>::infinity()) !=
           logits.end();
  }
};

/// The head of a prototype router. Throws invalid_argument, naming the field.
template <class T, class Config>
PrototypeHead<T> prototype_head(const char* router, const Config& config) {
  const Index routed = config.experts - (config.unconditional ? 1 : 0);
  require_count(router, "width", config.width);
  require_field(routed >= 1, router, "experts",
                config.unconditional ? "at least 2, one of them unconditional" : "at least 1",
                config.experts);
  require_finite(router, "scale", config.scale);
  require_field(config.projection >= 0, router, "projection", "at least 0", config.projection);
  PrototypeHead<T> head;
  head.prototypes = {config.projection > 0 ? config.projection : config.width, routed, false};
  if (config.projection > 0) head.projection = {config.width, config.projection, false};
  head.scale = config.scale;
  head.learned_scale = config.learned_scale;
  head.unconditional = {config.unconditional, config.unconditional_id};
  return head;
}

template <class T>
void PrototypeRule<T>::score(std::span<const T> logits, std::span<T> prob,
                             std::span<T> work) const noexcept {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  if (weight != PrototypeWeight::sigmoid) return stages::softmax<T>(logits, prob);
  for (std::size_t e = 0; e < logits.size(); ++e) {
    work[e] = logits[e] == kNever ? kNever : math::sigmoid<T>(logits[e]);
  }
  stages::softmax<T>(work.first(logits.size()), prob);
}

template <class T>
void PrototypeRule<T>::weigh(const RuleRow<T>& row, std::span<const std::int32_t> chosen,
                             std::span<T> gate) const noexcept {
  const bool infinite = is_infinite(row.logits);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const T l = row.logits[chosen[i]], p = row.prob[chosen[i]];
    switch (weight) {
      case PrototypeWeight::cosine: gate[i] = infinite ? p : l; break;
      case PrototypeWeight::sigmoid: gate[i] = math::sigmoid<T>(l); break;
      case PrototypeWeight::unit: gate[i] = T(1); break;
      default: gate[i] = p;
    }
  }
  if (weight == PrototypeWeight::softmax_of_selected) {
    stages::weigh<T>({Score::softmax, true, false, T(0), T(1)}, row.logits, row.prob, chosen, gate);
  }
}

template <class T>
Index PrototypeRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  score(row.logits, row.prob, row.work);
  const Index count = stages::select_top_k<T>(row.logits, row.chosen.first(k));
  const auto chosen = row.chosen.first(count);
  if (is_unconditional(row.logits)) {
    row.gate[0] = T(1);
  } else {
    weigh(row, chosen, row.gate.first(count));
  }
  return count;
}

template <class T>
void PrototypeRule<T>::backward(const RuleRow<T>& row, None,
                                const RuleRowGradient<T>& d) const noexcept {
  if (is_unconditional(row.logits)) return;
  const std::size_t experts = row.logits.size();
  const bool gates_count = weight != PrototypeWeight::unit && !is_infinite(row.logits);
  if (weight == PrototypeWeight::softmax_of_selected) {
    return weighted_scores_backward<T>({Score::softmax, true, false, T(0), T(1)}, row, d);
  }
  if (weight == PrototypeWeight::sigmoid) {
    const std::span<T> dvalue = row.work.first(experts);
    std::fill(dvalue.begin(), dvalue.end(), T(0));
    stages::softmax_backward<T>(row.prob, d.dprob, dvalue);
    for (std::size_t i = 0; i < row.chosen.size(); ++i) dvalue[row.chosen[i]] += d.dgate[i];
    for (std::size_t e = 0; e < experts; ++e) {
      const T s = math::sigmoid<T>(row.logits[e]);
      d.dlogits[e] = std::fma(dvalue[e], s * (T(1) - s), d.dlogits[e]);
    }
    return;
  }
  const std::span<T> dprob = row.work.first(experts);
  std::copy(d.dprob.begin(), d.dprob.end(), dprob.begin());
  for (std::size_t i = 0; gates_count && i < row.chosen.size(); ++i) {
    const bool by_logit = weight == PrototypeWeight::cosine;
    (by_logit ? d.dlogits : dprob)[row.chosen[i]] += d.dgate[i];
  }
  stages::softmax_backward<T>(row.prob, dprob, d.dlogits);
}

#ifndef MOLE_HEADER_ONLY
extern template struct PrototypeRule<float>;
extern template struct PrototypeRule<double>;
#endif

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// ExpertChoiceRouter: experts choose tokens, each the same number of them.
//
//   l = x Wᵀ + b (+ overrides)     capacity = min(n, ⌊capacity_factor · n / experts⌋), n real
//   tokens scores, a column s_te an expert:
//     over_experts   softmax of the row          ranked by s
//     over_tokens    softmax of the column       ranked by l
//     over_selected  softmax of the column over the chosen tokens alone, 0 elsewhere; ranked by l
//   every expert takes the `capacity` best tokens of its column, ties to the earlier token; g = s
//   tokens with mask 0 are never taken and have no part in a column's softmax
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. A token has 0 ... experts experts.
// Who else is in the batch decides: no causal model can route this way at inference. The selection
// is a constant in backward.
//
// Zhou et al., "Mixture-of-Experts with Expert Choice Routing", 2022 (over_experts).
#pragma once

#include <array>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/capacity.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

enum class ExpertChoiceScore { over_experts, over_tokens, over_selected };
constexpr std::array<std::string_view, 3> enum_names(ExpertChoiceScore) noexcept {
  return {"over_experts", "over_tokens", "over_selected"};
}

template <class T>
struct ExpertChoiceRule {
  double capacity_factor = 1;
  ExpertChoiceScore score = ExpertChoiceScore::over_experts;

  Index max_per_token(Index experts) const noexcept { return experts; }
  std::size_t scratch_bytes(Index tokens, Index experts, int workers) const noexcept;
  void forward(const RuleBatch<T>& batch, None, RoutingTable<T>& table,
               const Context& context) const;
  void backward(const RuleBatch<T>& batch, None, const Routing<T>& routing,
                const RuleBatchGradient<T>& d, const Context& context) const;
  static bool takes_part(const Tokens<T>& tokens, Index t) noexcept {
    return tokens.mask.empty() || tokens.mask[t] != 0;
  }
  Index capacity(Index tokens, Index experts) const noexcept {
    const double share =
        capacity_factor * static_cast<double>(tokens) / static_cast<double>(experts);
    return std::min(tokens, static_cast<Index>(share));
  }
};

template <class T>
class ExpertChoiceRouter : public HeadRouter<T, LinearHead<T>, ExpertChoiceRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    double capacity_factor = 1;  ///< experts a token on average
    ExpertChoiceScore score = ExpertChoiceScore::over_experts;
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "expert_choice"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"capacity_factor"}, c.capacity_factor...);
      f(Field{"score"}, c.score...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit ExpertChoiceRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, ExpertChoiceRule<T>>(
            linear_head<T>("ExpertChoiceRouter", config.width, config.experts, config.bias),
            {config.capacity_factor, config.score}),
        config_(config) {
    require_field(config.capacity_factor >= 0 && config.capacity_factor <= 1e9,
                  "ExpertChoiceRouter", "capacity_factor", "0 ... 1e9", config.capacity_factor);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
std::size_t ExpertChoiceRule<T>::scratch_bytes(Index tokens, Index experts,
                                               int workers) const noexcept {
  ByteCounter counter;
  counter.take<T>(3, tokens);
  counter.take<std::int32_t>(tokens);
  counter.take<std::uint8_t>(tokens, experts);
  counter.take<T>(experts);
  counter.take<std::int32_t>(experts);
  return counter.bytes() + 3 * kAlignment + stages::softmax_gates_backward_bytes(experts, workers);
}

template <class T>
void ExpertChoiceRule<T>::forward(const RuleBatch<T>& batch, None, RoutingTable<T>& table,
                                  const Context& context) const {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const Index count = batch.logits.rows, experts = batch.logits.cols;
  Index real = 0;
  for (Index t = 0; t < count; ++t) real += takes_part(batch.tokens, t);
  const Index places = capacity(real, experts);
  const Workspace::Frame frame(context.scratch);
  const auto logit = context.scratch.template take<T>(count);
  const auto score_of = context.scratch.template take<T>(count);
  const auto order = context.scratch.take<std::int32_t>(count);
  const auto taken = context.scratch.take<std::uint8_t>(count, experts);
  for (Index t = 0; t < count; ++t) std::fill_n(taken.row(t).begin(), experts, std::uint8_t{0});
  if (score == ExpertChoiceScore::over_experts) {
    stages::softmax_rows<T>(batch.logits, batch.prob, context);
  }
  for (Index e = 0; e < experts; ++e) {
    for (Index t = 0; t < count; ++t) {
      logit[t] = takes_part(batch.tokens, t) ? batch.logits(t, e) : kNever;
    }
    if (score == ExpertChoiceScore::over_experts) {
      for (Index t = 0; t < count; ++t) {
        score_of[t] = logit[t] == kNever ? kNever : batch.prob(t, e);
      }
    }
    const bool by_logit = score != ExpertChoiceScore::over_experts;
    const Index found = std::min(
        places, stages::sort_keys<T>(by_logit ? std::span<const T>(logit) : score_of, order));
    for (Index i = 0; i < found; ++i) taken(order[i], e) = 1;
    if (!by_logit) continue;
    if (score == ExpertChoiceScore::over_selected) {
      for (Index t = 0; t < count; ++t) {
        if (taken(t, e) == 0) logit[t] = kNever;
      }
    }
    stages::softmax<T>(logit, score_of);
    for (Index t = 0; t < count; ++t) batch.prob(t, e) = score_of[t];
  }
  const auto gate = context.scratch.template take<T>(experts);
  const auto chosen = context.scratch.take<std::int32_t>(experts);
  for (Index t = 0; t < count; ++t) {
    std::size_t slots = 0;
    for (Index e = 0; e < experts; ++e) {
      if (taken(t, e) == 0) continue;
      chosen[slots] = static_cast<std::int32_t>(e);
      gate[slots++] = batch.prob(t, e);
    }
    table.select(t, chosen.first(slots), gate.first(slots));
  }
}

template <class T>
void ExpertChoiceRule<T>::backward(const RuleBatch<T>& batch, None, const Routing<T>& routing,
                                   const RuleBatchGradient<T>& d, const Context& context) const {
  if (score == ExpertChoiceScore::over_experts) {
    return stages::softmax_gates_backward<T>(batch.logits, batch.prob, routing, d.dgate, d.dprob,
                                             d.dlogits, context, stages::add_scores<T>);
  }
  const Index count = batch.logits.rows, experts = batch.logits.cols;
  const Workspace::Frame frame(context.scratch);
  const auto prob = context.scratch.template take<T>(count);
  const auto dprob = context.scratch.template take<T>(count);
  const auto dlogit = context.scratch.template take<T>(count);
  const SlotLists& lists = routing.lists;
  for (Index e = 0; e < experts; ++e) {
    for (Index t = 0; t < count; ++t) {
      prob[t] = batch.prob(t, e);
      dprob[t] = d.dprob(t, e);
      dlogit[t] = T(0);
    }
    for (Index i = lists.expert_begin[e]; i < lists.expert_begin[e + 1]; ++i) {
      dprob[lists.token_of[i]] += d.dgate[lists.slot_of[i]];
    }
    stages::softmax_backward<T>(prob, dprob, dlogit);
    for (Index t = 0; t < count; ++t) d.dlogits(t, e) += dlogit[t];
  }
}

#ifndef MOLE_HEADER_ONLY
extern template struct ExpertChoiceRule<float>;
extern template struct ExpertChoiceRule<double>;
extern template class HeadRouter<float, LinearHead<float>, ExpertChoiceRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, ExpertChoiceRule<double>>;
#endif

static_assert(Router<ExpertChoiceRouter<float>>);
static_assert(Router<ExpertChoiceRouter<double>>);

}  // namespace mole::inline MOLE_ABI

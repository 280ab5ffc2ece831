// SPDX-License-Identifier: Apache-2.0
// PrototypeChoiceRouter: every expert takes the tokens of a sequence that are most like its
// prototype, the same number from every sequence.
//
//   l = scale · cos(x, p_e) (+ overrides)     n = tokens of the sequence that are routed
//   places = max(1, min(⌊(n / E) · k⌋, n)), E the experts with a prototype, in double
//   every one of them takes the `places` largest l of its column, ties to the earlier token
//
//   weight    g                                             prob
//   cosine    l                                             softmax(l) over the experts
//   sigmoid   σ(l)                                          softmax(σ(l)) over the experts
//   softmax   softmax of the column over the n tokens       the same
//
// Shapes and the unconditional expert: prototype.hpp. A token has 0 ... E experts; tokens with mask
// 0 are never taken and have no part in a column. Who else is in the sequence decides: no causal
// model can route this way at inference. The selection is a constant in backward.
//
// ProMoE's expert choice (Wei et al., 2025).
#pragma once

#include <algorithm>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/prototype_rule.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct PrototypeChoiceRule {
  Index k = 1;
  PrototypeRule<T> scores = {};  ///< of rows
  Unconditional unconditional = {};

  static constexpr Scope scope = Scope::sequence;
  Index max_per_token(Index experts) const noexcept { return experts; }
  std::size_t scratch_bytes(Index tokens, Index experts, int workers) const noexcept;
  void forward(const RuleBatch<T>& batch, None, RoutingTable<T>& table,
               const Context& context) const;
  void backward(const RuleBatch<T>& batch, None, const Routing<T>& routing,
                const RuleBatchGradient<T>& d, const Context& context) const;

  bool takes_part(const Tokens<T>& tokens, Index t) const noexcept {
    return (tokens.mask.empty() || tokens.mask[t] != 0) && !unconditional.covers(tokens, t);
  }
  Index places(Index tokens, Index experts) const noexcept {
    const double share = static_cast<double>(tokens) / static_cast<double>(experts);
    const double wanted = std::min(share * static_cast<double>(k), static_cast<double>(tokens));
    return std::min(tokens, std::max<Index>(1, static_cast<Index>(wanted)));
  }

 private:
  bool by_column() const noexcept { return scores.weight == PrototypeWeight::softmax; }
  void score_rows(const RuleBatch<T>& batch, const Context& context) const;
  void choose(const RuleBatch<T>& batch, Index begin, Index end, MatView<std::uint8_t> taken,
              const Context& context) const;
  void rows_backward(const RuleBatch<T>& batch, const Routing<T>& routing,
                     const RuleBatchGradient<T>& d, const Context& context) const;
  void columns_backward(const RuleBatch<T>& batch, const Routing<T>& routing,
                        const RuleBatchGradient<T>& d, const Context& context) const;
};

template <class T>
class PrototypeChoiceRouter : public HeadRouter<T, PrototypeHead<T>, PrototypeChoiceRule<T>> {
 public:
  struct Config {
    Index width = 0;
    Index experts = 0;                                 ///< the unconditional one included
    Index k = 1;                                       ///< at least 1; experts a token on average
    PrototypeWeight weight = PrototypeWeight::cosine;  ///< cosine, sigmoid or softmax
    T scale = T(1);
    bool learned_scale = false;  ///< the scale is a parameter
    Index projection = 0;        ///< width in which tokens and prototypes are compared; 0: of x
    bool unconditional = false;  ///< the last expert is for tokens with unconditional_id
    std::int32_t unconditional_id = -1;

    static constexpr std::string_view kind() noexcept { return "prototype_choice"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"weight"}, c.weight...);
      f(Field{"scale"}, c.scale...);
      f(Field{"learned_scale"}, c.learned_scale...);
      f(Field{"projection"}, c.projection...);
      f(Field{"unconditional"}, c.unconditional...);
      f(Field{"unconditional_id"}, c.unconditional_id...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit PrototypeChoiceRouter(const Config& config)
      : HeadRouter<T, PrototypeHead<T>, PrototypeChoiceRule<T>>(
            prototype_head<T>("PrototypeChoiceRouter", config),
            {config.k,
             {1, config.weight, config.unconditional},
             {config.unconditional, config.unconditional_id}}),
        config_(config) {
    require_count("PrototypeChoiceRouter", "k", config.k);
    require_field(config.weight <= PrototypeWeight::softmax, "PrototypeChoiceRouter", "weight",
                  "cosine, sigmoid or softmax",
                  enum_names(config.weight)[static_cast<std::size_t>(config.weight)]);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
std::size_t PrototypeChoiceRule<T>::scratch_bytes(Index tokens, Index experts,
                                                  int workers) const noexcept {
  ByteCounter counter;
  counter.take<T>(3, tokens);
  counter.take<T>(tokens);
  counter.take<T>(tokens);
  counter.take<std::int32_t>(tokens);
  counter.take<std::uint8_t>(tokens, experts);
  counter.take<T>(experts);
  counter.take<std::int32_t>(experts);
  WorkerRows<T>(counter, workers, 4, experts);
  WorkerRows<std::int32_t>(counter, workers, 1, experts);
  return counter.bytes();
}

template <class T>
void PrototypeChoiceRule<T>::score_rows(const RuleBatch<T>& batch, const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const WorkerRows<T> work(context.scratch, context.workers, 1, batch.logits.cols);
  parallel_for(context, batch.logits.rows, kTokensPerTask, [&](Index begin, Index end, int worker) {
    for (Index t = begin; t < end; ++t) {
      scores.score(batch.logits.row(t), batch.prob.row(t), work(worker, 0));
    }
  });
}

template <class T>
void PrototypeChoiceRule<T>::choose(const RuleBatch<T>& batch, Index begin, Index end,
                                    MatView<std::uint8_t> taken, const Context& context) const {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const Workspace::Frame frame(context.scratch);
  const Index count = end - begin;
  const auto column = context.scratch.template take<T>(count);
  const auto share = context.scratch.template take<T>(count);
  const auto order = context.scratch.take<std::int32_t>(count);
  const Index experts = batch.logits.cols - (unconditional.expert ? 1 : 0);
  Index routed = 0;
  for (Index t = begin; t < end; ++t) routed += takes_part(batch.tokens, t);
  for (Index e = 0; e < experts; ++e) {
    for (Index t = begin; t < end; ++t) {
      column[t - begin] = takes_part(batch.tokens, t) ? batch.logits(t, e) : kNever;
    }
    const Index found = std::min(places(routed, experts), stages::sort_keys<T>(column, order));
    for (Index i = 0; i < found; ++i) taken(begin + order[i], e) = 1;
    if (!by_column()) continue;
    stages::softmax<T>(column, share);
    for (Index t = begin; t < end; ++t) {
      if (!unconditional.covers(batch.tokens, t)) batch.prob(t, e) = share[t - begin];
    }
  }
}

template <class T>
void PrototypeChoiceRule<T>::forward(const RuleBatch<T>& batch, None, RoutingTable<T>& table,
                                     const Context& context) const {
  const Index count = batch.logits.rows, experts = batch.logits.cols;
  const Workspace::Frame frame(context.scratch);
  const auto taken = context.scratch.take<std::uint8_t>(count, experts);
  const auto gate = context.scratch.template take<T>(experts);
  const auto chosen = context.scratch.take<std::int32_t>(experts);
  score_rows(batch, context);
  for (Index t = 0; t < count; ++t) {
    std::ranges::fill(taken.row(t), std::uint8_t{0});
    if (scores.is_unconditional(batch.logits.row(t))) taken(t, experts - 1) = 1;
  }
  for_each_sequence(batch.tokens,
                    [&](Index begin, Index end) { choose(batch, begin, end, taken, context); });
  for (Index t = 0; t < count; ++t) {
    std::size_t slots = 0;
    for (Index e = 0; e < experts; ++e) {
      if (taken(t, e) != 0) chosen[slots++] = static_cast<std::int32_t>(e);
    }
    const auto gates = gate.first(slots);
    if (scores.is_unconditional(batch.logits.row(t))) {
      std::fill(gates.begin(), gates.end(), T(1));
    } else {
      scores.weigh({.logits = batch.logits.row(t), .prob = batch.prob.row(t)}, chosen.first(slots),
                   gates);
    }
    table.select(t, chosen.first(slots), gates);
  }
}

template <class T>
void PrototypeChoiceRule<T>::rows_backward(const RuleBatch<T>& batch, const Routing<T>& routing,
                                           const RuleBatchGradient<T>& d,
                                           const Context& context) const {
  const Index experts = batch.logits.cols;
  const Workspace::Frame frame(context.scratch);
  const WorkerRows<T> rows(context.scratch, context.workers, 1, 4 * experts);
  const WorkerRows<std::int32_t> ids(context.scratch, context.workers, 1, experts);
  parallel_for(context, routing.tokens, kTokensPerTask, [&](Index begin, Index end, int worker) {
    for (Index t = begin; t < end; ++t) {
      const Index first = routing.token_begin[t], slots = routing.token_begin[t + 1] - first;
      const std::span<T> work = rows(worker, 0);
      const std::span<std::int32_t> chosen = ids(worker, 0).first(static_cast<std::size_t>(slots));
      std::copy_n(routing.expert.begin() + first, slots, chosen.begin());
      RuleRow<T> row{.token = t,
                     .logits = batch.logits.row(t),
                     .prob = batch.prob.row(t),
                     .chosen = chosen,
                     .work = work};
      scores.backward(row, {},
                      {d.dgate.subspan(static_cast<std::size_t>(first), chosen.size()),
                       d.dprob.row(t),
                       d.dlogits.row(t),
                       {}});
    }
  });
}

template <class T>
void PrototypeChoiceRule<T>::columns_backward(const RuleBatch<T>& batch, const Routing<T>& routing,
                                              const RuleBatchGradient<T>& d,
                                              const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const MatView<T> work = context.scratch.template take<T>(3, batch.logits.rows);
  const SlotLists& lists = routing.lists;
  const Index experts = batch.logits.cols - (unconditional.expert ? 1 : 0);
  for (Index e = 0; e < experts; ++e) {
    const std::span<T> prob = work.row(0), dprob = work.row(1), dlogit = work.row(2);
    for (Index t = 0; t < batch.logits.rows; ++t) {
      const bool apart = unconditional.covers(batch.tokens, t);
      prob[t] = apart ? T(0) : batch.prob(t, e);
      dprob[t] = d.dprob(t, e);
      dlogit[t] = T(0);
    }
    for (Index i = lists.expert_begin[e]; i < lists.expert_begin[e + 1]; ++i) {
      dprob[lists.token_of[i]] += d.dgate[lists.slot_of[i]];
    }
    for_each_sequence(batch.tokens, [&](Index begin, Index end) {
      const auto first = static_cast<std::size_t>(begin);
      const auto size = static_cast<std::size_t>(end - begin);
      stages::softmax_backward<T>(prob.subspan(first, size), dprob.subspan(first, size),
                                  dlogit.subspan(first, size));
    });
    for (Index t = 0; t < batch.logits.rows; ++t) d.dlogits(t, e) += dlogit[t];
  }
}

template <class T>
void PrototypeChoiceRule<T>::backward(const RuleBatch<T>& batch, None, const Routing<T>& routing,
                                      const RuleBatchGradient<T>& d, const Context& context) const {
  if (by_column()) {
    columns_backward(batch, routing, d, context);
  } else {
    rows_backward(batch, routing, d, context);
  }
}

#ifndef MOLE_HEADER_ONLY
extern template struct PrototypeChoiceRule<float>;
extern template struct PrototypeChoiceRule<double>;
extern template class HeadRouter<float, PrototypeHead<float>, PrototypeChoiceRule<float>>;
extern template class HeadRouter<double, PrototypeHead<double>, PrototypeChoiceRule<double>>;
#endif

static_assert(Router<PrototypeChoiceRouter<float>>);
static_assert(Router<PrototypeChoiceRouter<double>>);

}  // namespace mole::inline MOLE_ABI

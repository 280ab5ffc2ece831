// SPDX-License-Identifier: Apache-2.0
// Rules: what logits decide. The second half of a HeadRouter (head_router.hpp). A rule has one of
// two forms, told apart by what it is called with.
//
// A row rule decides token by token:
//
//   Index max_per_token(Index experts)
//   Index forward(const RuleRow<T>&, const Buffers&)                  how many it has chosen
//   void backward(const RuleRow<T>&, const Buffers&, const RuleRowGradient<T>&)
//
// A batch rule looks at all tokens of the call and fills the table itself:
//
//   Index max_per_token(Index experts)
//   std::size_t scratch_bytes(Index tokens, Index experts, int workers)
//   void forward(const RuleBatch<T>&, const Buffers&, RoutingTable<T>&, const Context&)
//   void backward(const RuleBatch<T>&, const Buffers&, const Routing<T>&,
//                 const RuleBatchGradient<T>&, const Context&)
//
// Optional members of a rule: Buffers (None), kWorkRows (0), scope (token for row rules, batch for
// batch rules), gradient (exact), check(buffers, tokens, experts), which throws.
//
// A logit of -inf is an expert that is not available: its score is 0 and it is never chosen.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/view.hpp"
#include "mole/routing/score.hpp"
#include "mole/routing/tokens.hpp"
#include "mole/routing/weight.hpp"

namespace mole::inline MOLE_ABI {

/// One token as a row rule sees it. In backward everything is as forward left it, but `chosen`
/// ascends; rows have one element an expert, chosen and gate one a slot.
template <class T>
struct RuleRow {
  Index token = 0;
  std::int32_t id = -1;                 ///< Tokens::ids of the token, or -1
  std::span<const T> logits = {};       ///< after the overrides
  std::span<const T> side = {};         ///< the further columns of the head
  std::span<T> prob = {};               ///< to fill: the scores that losses see
  std::span<std::int32_t> chosen = {};  ///< to fill, room for max_per_token distinct experts
  std::span<T> gate = {};               ///< to fill; 0 is a probe
  std::span<T> work = {};               ///< kWorkRows rows of scratch
  std::span<std::int32_t> order = {};   ///< a row of scratch
};

/// Gradients of one token. `dgate` by slot and `dprob` come in; the rule adds into the others.
template <class T>
struct RuleRowGradient {
  std::span<const T> dgate, dprob;
  std::span<T> dlogits, dside;
};

/// All tokens as a batch rule sees them. `prob` is to fill in forward.
template <class T>
struct RuleBatch {
  const Tokens<T>& tokens;
  MatView<const T> logits, side;
  MatView<T> prob;
};

template <class T>
struct RuleBatchGradient {
  std::span<const T> dgate;
  MatView<const T> dprob;
  MatView<T> dlogits, dside;
};

namespace detail {

template <class Rule>
struct RuleBuffers {
  using type = None;
};
template <class Rule>
requires requires {
  typename Rule::Buffers;
}
struct RuleBuffers<Rule> {
  using type = typename Rule::Buffers;
};

template <class Rule>
constexpr Index work_rows() {
  if constexpr (requires { Rule::kWorkRows; }) {
    return Rule::kWorkRows;
  } else {
    return 0;
  }
}

}  // namespace detail

template <class Rule, class T>
concept RowRule = requires(const Rule rule, const RuleRow<T> row, const RuleRowGradient<T> d,
                           const typename detail::RuleBuffers<Rule>::type buffers, Index n) {
  { rule.max_per_token(n) } -> std::convertible_to<Index>;
  { rule.forward(row, buffers) } -> std::convertible_to<Index>;
  rule.backward(row, buffers, d);
};

/// The backward of gates that stages::weigh has made of the scores of a row, and of the scores
/// themselves. Needs one row of work.
template <class T>
void weighted_scores_backward(const Weighting<T>& how, const RuleRow<T>& row,
                              const RuleRowGradient<T>& d) noexcept {
  const std::span<T> dscore = row.work.first(row.logits.size());
  std::copy(d.dprob.begin(), d.dprob.end(), dscore.begin());
  stages::weigh_backward<T>(how, row.logits, row.prob, row.chosen, d.dgate, dscore, d.dlogits,
                            row.gate);
  stages::score_backward<T>(how.score, row.logits, row.prob, dscore, d.dlogits);
}

}  // namespace mole::inline MOLE_ABI

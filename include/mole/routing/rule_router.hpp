// SPDX-License-Identifier: Apache-2.0
// RuleRouter: a whole Router from a rule for one token, the short way to a router of one's own.
//
//   l = x Wᵀ + b (+ overrides)     (prob, gate) = rule(l)     an expert with gate 0 is not selected
//
// A rule is a value with three const noexcept members, rows of [experts]:
//
//   Index max_per_token(Index experts)
//   void forward(l, prob, gate)                      prob: what losses see
//   void backward(l, prob, gate, dgate, dprob, dl)   adds into dl; dgate is 0 where gate is 0
//
// A logit of -inf is an expert that is not available; its gate must be 0.
#pragma once

#include <algorithm>
#include <concepts>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class Rule, class T>
concept TokenRule = requires(const Rule rule, std::span<const T> in, std::span<T> out, Index n) {
  { rule.max_per_token(n) } -> std::convertible_to<Index>;
  rule.forward(in, out, out);
  rule.backward(in, in, in, in, in, out);
};

/// A TokenRule, whose gates are rows over all experts, as a row rule, which lists what it chose.
template <class T, TokenRule<T> Rule>
struct ListedRule {
  static constexpr Index kWorkRows = 2;
  Rule rule = {};

  Index max_per_token(Index experts) const noexcept { return rule.max_per_token(experts); }

  Index forward(const RuleRow<T>& row, None) const noexcept {
    const std::span<T> gate = row.work.first(row.logits.size());
    rule.forward(row.logits, row.prob, gate);
    std::size_t slots = 0;
    for (std::size_t e = 0; e < gate.size(); ++e) {
      if (gate[e] == T(0)) continue;
      if (slots == row.chosen.size()) return static_cast<Index>(slots) + 1;
      row.chosen[slots] = static_cast<std::int32_t>(e);
      row.gate[slots++] = gate[e];
    }
    return static_cast<Index>(slots);
  }

  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept {
    const std::size_t experts = row.logits.size();
    const std::span<T> gate = row.work.first(experts), dgate = row.work.subspan(experts, experts);
    std::fill(row.work.begin(), row.work.end(), T(0));
    for (std::size_t i = 0; i < row.chosen.size(); ++i) {
      gate[row.chosen[i]] = row.gate[i];
      dgate[row.chosen[i]] = d.dgate[i];
    }
    rule.backward(row.logits, row.prob, gate, dgate, d.dprob, d.dlogits);
  }
};

template <class T, TokenRule<T> Rule>
class RuleRouter : public HeadRouter<T, LinearHead<T>, ListedRule<T, Rule>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    bool bias = false;  ///< the router has a bias parameter
    Rule rule = {};

    /// A rule that has `kind` and `visit`, as a config has them, can be described.
    static constexpr std::string_view kind() noexcept requires requires { Rule::kind(); }
    { return Rule::kind(); }
    template <class F, class... C>
    static void visit(F&& f, C&... c) requires requires {
      Rule::kind();
    }
    {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"bias"}, c.bias...);
      Rule::visit(f, c.rule...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit RuleRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, ListedRule<T, Rule>>(
            linear_head<T>("RuleRouter", config.width, config.experts, config.bias), {config.rule}),
        config_(config) {}

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

}  // namespace mole::inline MOLE_ABI

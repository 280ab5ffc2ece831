// SPDX-License-Identifier: Apache-2.0
// What routers with capacities and the layers with them have in common.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/routers/expert_choice.hpp"
#include "mole/routers/gshard.hpp"

namespace golden {

inline mole::SecondChoice second_choice(const std::string& name) {
  if (name == "all") return mole::SecondChoice::all;
  if (name == "none") return mole::SecondChoice::none;
  if (name == "threshold") return mole::SecondChoice::threshold;
  if (name == "random") return mole::SecondChoice::random;
  throw std::invalid_argument("unknown policy " + name);
}

/// The policy for second choices is one of before_drop.
template <class T>
mole::GShardRouter<T> gshard_router(Case<T>& c, Index width, Index experts) {
  const bool before = c.template config<std::string>("renorm") == "before_drop";
  return mole::GShardRouter<T>(
      {.width = width,
       .experts = experts,
       .capacity = c.template config<Index>("capacity"),
       .renormalise_before_drop = before,
       .second = second_choice(before ? c.template config<std::string>("second_policy") : "all"),
       .second_threshold = c.template config<T>("second_threshold"),
       .renorm_epsilon = c.template config<T>("renorm_eps"),
       .by_gate = c.template config<std::string>("priority") == "gate",
       .bias = has_router_bias(c)});
}

/// Places of the slots: first choices before second ones, in the order in which tokens are visited.
template <class T>
MatView<T> gshard_locations(Case<T>& c, const mole::Routing<T>& routing, MatView<const T> prob) {
  const auto best = [&](Index t) {
    const auto row = prob.row(t);
    return std::max_element(row.begin(), row.end());
  };
  std::vector<Index> order = ascending(routing.tokens);
  if (c.template config<std::string>("priority") == "gate") {
    std::stable_sort(order.begin(), order.end(),
                     [&](Index a, Index b) { return *best(a) > *best(b); });
  }
  return locations(c, routing, order,
                   [&](Index t, Index e) { return best(t) - prob.row(t).begin() == e; });
}

inline mole::ExpertChoiceScore expert_choice_score(const std::string& name) {
  if (name == "softmax_experts") return mole::ExpertChoiceScore::over_experts;
  if (name == "softmax_tokens") return mole::ExpertChoiceScore::over_tokens;
  if (name == "softmax_selected") return mole::ExpertChoiceScore::over_selected;
  throw std::invalid_argument("unknown score " + name);
}

}  // namespace golden

// SPDX-License-Identifier: Apache-2.0
// Routers in which tokens compete: capacities, expert choice, balanced assignment.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/routers/expert_choice.hpp"
#include "mole/routers/gshard.hpp"
#include "mole/routers/sinkhorn.hpp"
#include "mole/routers/switch.hpp"
#include "mole/routers/top_k_capacity.hpp"

namespace {

using golden::Case;
using golden::RouterRun;
using mole::Index;
using mole::MatView;

template <class T, class Run>
void finish(Run& run) {
  run.add_gate_gradient();
  run.backward();
  run.expect_gradients(run.grad);
}

template <class T>
void switch_router(Case<T>& c) {
  using Router = mole::SwitchRouter<T>;
  const Index tokens = c.extent("in.dgate", 0);
  const auto begin = golden::equal_sequences(tokens, c.template config<Index>("sequences"));
  RouterRun<Router> run(c,
                        Router({.width = golden::router_width(c),
                                .experts = golden::router_experts(c),
                                .capacity = c.template config<Index>("capacity"),
                                .bias = c.has("param.router.bias")}),
                        golden::router_weights(c, golden::router_experts(c)), {},
                        {.x = golden::router_input(c), .sequence_begin = begin});
  run.expect_decision();
  std::vector<T> top;
  std::vector<std::uint8_t> dropped;
  for (Index t = 0; t < tokens; ++t) {
    const auto prob = run.tape.prob.row(t);
    const auto best = std::max_element(prob.begin(), prob.end());
    top.push_back(*best);
    dropped.push_back(run.routing.token_begin[t] == run.routing.token_begin[t + 1]);
    run.d_tape.prob(t, best - prob.begin()) += c.values("in.dprob")[t];
  }
  c.expect("out.top_prob", top);
  c.expect("out.dropped", dropped);
  finish<T>(run);
}
GOLDEN_KIND("router.switch", switch_router);
GOLDEN_KIND("router.mixlora_switch", switch_router);

mole::SecondChoice second_choice(const std::string& name) {
  if (name == "all") return mole::SecondChoice::all;
  if (name == "none") return mole::SecondChoice::none;
  if (name == "threshold") return mole::SecondChoice::threshold;
  if (name == "random") return mole::SecondChoice::random;
  throw std::invalid_argument("unknown policy " + name);
}

template <class T>
void top2_capacity(Case<T>& c) {
  using Router = mole::GShardRouter<T>;
  const bool by_gate = c.template config<std::string>("priority") == "gate";
  typename Router::Buffers buffers;
  if (c.has("in.uniform")) buffers.uniform = c.values("in.uniform");
  std::vector<std::uint8_t> mask;
  if (c.has("in.mask")) mask = c.mask("in.mask");
  RouterRun<Router> run(
      c,
      Router({.width = golden::router_width(c),
              .experts = golden::router_experts(c),
              .capacity = c.template config<Index>("capacity"),
              .renormalise_before_drop = c.template config<std::string>("renorm") == "before_drop",
              .second = second_choice(c.template config<std::string>("second_policy")),
              .second_threshold = c.template config<T>("second_threshold"),
              .renorm_epsilon = c.template config<T>("renorm_eps"),
              .by_gate = by_gate,
              .bias = c.has("param.router.bias")}),
      golden::router_weights(c, golden::router_experts(c)), buffers,
      {.x = golden::router_input(c), .mask = mask});
  run.expect_decision();
  const auto best = [&](Index t) {
    const auto row = run.tape.prob.row(t);
    return std::max_element(row.begin(), row.end());
  };
  std::vector<Index> order = golden::ascending(run.routing.tokens);
  if (by_gate) {
    std::stable_sort(order.begin(), order.end(),
                     [&](Index a, Index b) { return *best(a) > *best(b); });
  }
  c.expect("out.location", golden::locations(c, run.routing, order, [&](Index t, Index e) {
             return best(t) - run.tape.prob.row(t).begin() == e;
           }));
  finish<T>(run);
}
GOLDEN_KIND("router.top2_capacity", top2_capacity);

mole::DropBy drop_by(const std::string& name) {
  if (name == "probs") return mole::DropBy::score;
  if (name == "position") return mole::DropBy::position;
  if (name == "random") return mole::DropBy::random;
  throw std::invalid_argument("unknown policy " + name);
}

template <class T>
void top_k_capacity(Case<T>& c) {
  using Router = mole::TopKCapacityRouter<T>;
  typename Router::Buffers buffers;
  if (c.has("in.uniform")) buffers.uniform = c.matrix("in.uniform");
  RouterRun<Router> run(
      c,
      Router({.width = golden::router_width(c),
              .experts = golden::router_experts(c),
              .k = c.template config<Index>("k"),
              .capacity = c.template config<Index>("capacity"),
              .over_selection = c.template config<std::string>("order") == "topk_then_score",
              .renormalise = c.template config<bool>("renorm_after_drop"),
              .drop = drop_by(c.template config<std::string>("drop_policy")),
              .bias = c.has("param.router.bias")}),
      golden::router_weights(c, golden::router_experts(c)), buffers,
      {.x = golden::router_input(c)});
  run.expect_decision();
  c.expect("out.location", golden::locations(c, run.routing, golden::ascending(run.routing.tokens),
                                             [](Index, Index) { return true; }));
  finish<T>(run);
}
GOLDEN_KIND("router.top_k_capacity", top_k_capacity);

mole::ExpertChoiceScore expert_choice_score(const std::string& name) {
  if (name == "softmax_experts") return mole::ExpertChoiceScore::over_experts;
  if (name == "softmax_tokens") return mole::ExpertChoiceScore::over_tokens;
  if (name == "softmax_selected") return mole::ExpertChoiceScore::over_selected;
  throw std::invalid_argument("unknown score " + name);
}

template <class T>
void expert_choice(Case<T>& c) {
  using Router = mole::ExpertChoiceRouter<T>;
  RouterRun<Router> run(
      c,
      Router({.width = golden::router_width(c),
              .experts = golden::router_experts(c),
              .capacity_factor = c.template config<double>("capacity_factor"),
              .score = expert_choice_score(c.template config<std::string>("score"))}),
      golden::router_weights(c, golden::router_experts(c)), {}, {.x = golden::router_input(c)});
  run.expect_decision();
  std::vector<std::int64_t> chosen;
  const MatView<T> gate = run.dense(false);
  for (Index e = 0; e < run.routing.experts; ++e) {
    const auto& lists = run.routing.lists;
    const auto first = chosen.size();
    for (Index i = lists.expert_begin[e]; i < lists.expert_begin[e + 1]; ++i) {
      chosen.push_back(lists.token_of[i]);
    }
    std::sort(chosen.begin() + static_cast<std::ptrdiff_t>(first), chosen.end());
    std::stable_sort(chosen.begin() + static_cast<std::ptrdiff_t>(first), chosen.end(),
                     [&](std::int64_t a, std::int64_t b) { return gate(a, e) > gate(b, e); });
  }
  c.expect("out.tokens", chosen);
  finish<T>(run);
}
GOLDEN_KIND("router.expert_choice", expert_choice);

template <class T>
void sinkhorn(Case<T>& c) {
  using Router = mole::SinkhornRouter<T>;
  const Router router({.width = golden::router_width(c),
                       .experts = golden::router_experts(c),
                       .k = c.template config<Index>("k"),
                       .epsilon = c.template config<T>("epsilon"),
                       .tolerance = c.template config<T>("tolerance")});
  RouterRun<Router> run(c, router, golden::router_weights(c, golden::router_experts(c)),
                        {.balance = c.template config<bool>("train")},
                        {.x = golden::router_input(c)});
  run.expect_decision();
  if (c.has("out.plan")) {
    const Index tokens = run.routing.tokens;
    std::vector<T> u(static_cast<std::size_t>(tokens)),
        v(static_cast<std::size_t>(golden::router_experts(c)));
    std::vector<T> work(v.size());
    const MatView<const T> logits = run.tape.logits;
    c.expect("out.iterations", router.rule().scale(logits, u, v, work));
    c.expect("out.token_scaling", u);
    c.expect("out.expert_scaling", v);
    const MatView<T> plan = golden::zeros(c, tokens, golden::router_experts(c));
    for (Index t = 0; t < tokens; ++t) {
      for (Index e = 0; e < plan.cols; ++e) {
        plan(t, e) = u[t] * mole::math::exp<T>(logits(t, e)) * v[e];
      }
    }
    c.expect("out.plan", plan);
  }
  finish<T>(run);
}
GOLDEN_KIND("router.sinkhorn", sinkhorn);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Routers in which tokens compete: capacities, expert choice, balanced assignment.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/capacity.hpp"
#include "golden/kinds/router_run.hpp"
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
  c.expect_option("inference", false);
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
    if (!c.has("in.dprob")) continue;
    run.d_tape.prob(t, best - prob.begin()) += c.values("in.dprob")[t];
  }
  c.expect("out.top_prob", top);
  c.expect("out.dropped", dropped);
  finish<T>(run);
}
GOLDEN_KIND("router.switch", switch_router);
GOLDEN_KIND("router.mixlora_switch", switch_router);

template <class T>
void top2_capacity(Case<T>& c) {
  using Router = mole::GShardRouter<T>;
  typename Router::Buffers buffers;
  if (c.has("in.uniform")) buffers.uniform = c.values("in.uniform");
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  RouterRun<Router> run(
      c, golden::gshard_router(c, golden::router_width(c), golden::router_experts(c)),
      golden::router_weights(c, golden::router_experts(c)), buffers,
      {.x = golden::router_input(c), .mask = mask});
  run.expect_decision();
  c.expect("out.location", golden::gshard_locations<T>(c, run.routing, run.tape.prob));
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
  c.expect_option("score", "softmax");
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

template <class T>
void expert_choice(Case<T>& c) {
  using Router = mole::ExpertChoiceRouter<T>;
  const auto score = golden::expert_choice_score(c.template config<std::string>("score"));
  RouterRun<Router> run(c,
                        Router({.width = golden::router_width(c),
                                .experts = golden::router_experts(c),
                                .capacity_factor = c.template config<double>("capacity_factor"),
                                .score = score,
                                .bias = golden::has_router_bias(c)}),
                        golden::router_weights(c, golden::router_experts(c)), {},
                        {.x = golden::router_input(c)});
  run.expect_decision();
  // The logits order a column as its softmax does, and do not underflow.
  const bool by_logit = score != mole::ExpertChoiceScore::over_experts;
  const MatView<T> key = by_logit ? run.tape.logits : run.dense(false);
  std::vector<std::int64_t> chosen;
  for (Index e = 0; e < run.routing.experts; ++e) {
    const auto& lists = run.routing.lists;
    const auto first = chosen.size();
    for (Index i = lists.expert_begin[e]; i < lists.expert_begin[e + 1]; ++i) {
      chosen.push_back(lists.token_of[i]);
    }
    std::sort(chosen.begin() + static_cast<std::ptrdiff_t>(first), chosen.end());
    std::stable_sort(chosen.begin() + static_cast<std::ptrdiff_t>(first), chosen.end(),
                     [&](std::int64_t a, std::int64_t b) { return key(a, e) > key(b, e); });
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
                       .tolerance = c.template config<T>("tolerance"),
                       .bias = golden::has_router_bias(c)});
  c.expect_option("gate", router.max_per_token() == 1 ? "sigmoid" : "softmax");
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

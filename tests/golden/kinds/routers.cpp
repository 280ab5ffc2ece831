// SPDX-License-Identifier: Apache-2.0
// Routers that decide token by token.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/dynmole.hpp"
#include "golden/kinds/noisy.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/losses/balance.hpp"
#include "mole/losses/shifted_balance.hpp"
#include "mole/losses/sparsity.hpp"
#include "mole/routers/deepseek.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/hard_top_k.hpp"
#include "mole/routers/hash.hpp"
#include "mole/routers/learned_threshold.hpp"
#include "mole/routers/relu.hpp"
#include "mole/routers/scored_hash.hpp"
#include "mole/routers/sigmoid.hpp"
#include "mole/routers/straight_through.hpp"
#include "mole/routers/threshold.hpp"
#include "mole/routers/top_k.hpp"
#include "mole/routers/top_p.hpp"
#include "mole/routers/tsallis.hpp"
#include "mole/routing/balance_bias.hpp"

namespace {

using golden::Case;
using golden::RouterRun;
using mole::Index;
using mole::MatView;

template <class T>
void top_k(Case<T>& c) {
  using Router = mole::TopKRouter<T>;
  const bool scores_first = c.template config<std::string>("order") == "score_then_topk";
  const Router router(
      {.width = golden::router_width(c),
       .experts = golden::router_experts(c),
       .k = c.template config<Index>("k"),
       .score = golden::score_named(c.template config<std::string>("score")),
       .order = scores_first ? Router::Order::score_then_topk : Router::Order::topk_then_score,
       .renormalise = c.template config<bool>("renorm"),
       .renorm_epsilon = c.template config<T>("renorm_eps"),
       .temperature = c.template config<T>("temperature"),
       .scale = c.template config<T>("scale"),
       .bias = c.has("param.router.bias")});
  typename Router::Buffers buffers;
  if (c.has("state.bias")) buffers.selection_bias = c.values("state.bias");
  const golden::Masked<T> masked(c, router.experts());
  golden::run_router(c, router, buffers, masked.overrides);
}
GOLDEN_KIND("router.top_k", top_k);

template <class T>
void dense_softmax(Case<T>& c) {
  const golden::Masked<T> masked(c, golden::router_experts(c));
  golden::run_router(c,
                     mole::DenseRouter<T>({.width = golden::router_width(c),
                                           .experts = golden::router_experts(c),
                                           .temperature = c.template config<T>("temperature"),
                                           .bias = c.has("param.router.bias")}),
                     {}, masked.overrides);
}
GOLDEN_KIND("router.dense_softmax", dense_softmax);

template <class T>
void top_p(Case<T>& c) {
  const T temperature = c.template config<T>("temperature");
  golden::run_router(c,
                     mole::TopPRouter<T>({.width = golden::router_width(c),
                                          .experts = golden::router_experts(c),
                                          .top_p = c.template config<T>("top_p"),
                                          .temperature = temperature == T(0) ? T(1) : temperature,
                                          .bias = golden::has_router_bias(c)}));
}
GOLDEN_KIND("router.dynamic_moe", top_p);
GOLDEN_KIND("router.mixlora_dynamic", top_p);

template <class T>
void dynmole(Case<T>& c) {
  const Index experts = golden::router_experts(c);
  const mole::TsallisRouter<T> router(
      golden::dynmole_config(c, golden::router_width(c), experts, golden::has_router_bias(c)));
  RouterRun<mole::TsallisRouter<T>> run(c, router, golden::router_weights(c, experts), {},
                                        {.x = golden::router_input(c)});
  run.expect_decision();
  run.add_gate_gradient();
  const mole::Entropy<T> entropy = golden::dynmole_entropy(router);
  std::vector<T> values;
  for (Index t = 0; t < run.routing.tokens; ++t) {
    values.push_back(mole::stages::entropy<T>(entropy, run.tape.prob.row(t)));
    if (!c.has("in.dentropy")) continue;
    mole::stages::entropy_backward<T>(entropy, run.tape.prob.row(t), c.values("in.dentropy")[t],
                                      run.d_tape.prob.row(t));
  }
  c.expect("out.entropy", values);
  run.backward();
  run.expect_gradients(run.grad);
}
GOLDEN_KIND("router.dynmole", dynmole);

template <class T>
void threshold(Case<T>& c) {
  using Router = mole::ThresholdRouter<T>;
  RouterRun<Router> run(c,
                        Router({.width = golden::router_width(c),
                                .experts = golden::router_experts(c),
                                .threshold = c.template config<T>("threshold"),
                                .bias = golden::has_router_bias(c)}),
                        golden::router_weights(c, golden::router_experts(c)), {},
                        {.x = golden::router_input(c)});
  run.expect_decision();
  const mole::BalanceLoss<T> loss{.count_zero_gates = true};
  c.expect("out.loss", mole::balance_loss<T>(loss, run.routing, run.tape.prob, {}, c.context()));
  mole::balance_loss<T>({.weight = golden::loss_weight(c), .count_zero_gates = true}, run.routing,
                        run.tape.prob, run.d_tape.prob, c.context());
  run.add_gate_gradient();
  run.backward();
  run.expect_gradients(run.grad);
}
GOLDEN_KIND("router.mole_threshold", threshold);

template <class T>
void adamole(Case<T>& c) {
  using Router = mole::LearnedThresholdRouter<T>;
  const Router router({.width = golden::router_width(c),
                       .experts = golden::router_experts(c),
                       .max_threshold = c.template config<T>("max_threshold"),
                       .bias = golden::has_router_bias(c)});
  RouterRun<Router> run(c, router,
                        {golden::router_weights(c, golden::router_experts(c)),
                         {c.matrix("param.threshold.weight"), c.matrix("param.threshold.bias")}},
                        {}, {.x = golden::router_input(c)});
  run.expect_decision();
  std::vector<T> tau, dtau(static_cast<std::size_t>(run.routing.tokens));
  for (Index t = 0; t < run.routing.tokens; ++t) {
    tau.push_back(router.rule().threshold(run.tape.side(t, 0)));
  }
  c.expect("out.threshold", tau);
  c.expect("out.loss", mole::shifted_balance_loss<T>(1, MatView<const T>(run.tape.prob), tau, {},
                                                     {}, c.context()));
  mole::shifted_balance_loss<T>(golden::loss_weight(c), MatView<const T>(run.tape.prob), tau,
                                run.d_tape.prob, dtau, c.context());
  for (Index t = 0; t < run.routing.tokens; ++t) {
    run.d_tape.side(t, 0) += dtau[t] * router.rule().threshold_slope(run.tape.side(t, 0));
  }
  run.add_gate_gradient();
  run.backward();
  run.expect_gradients(run.grad.router);
  c.expect("grad.param.threshold.weight", run.grad.side.weight);
  c.expect("grad.param.threshold.bias", run.grad.side.bias);
}
GOLDEN_KIND("router.adamole", adamole);

template <class T>
void deepseek(Case<T>& c) {
  using Router = mole::DeepSeekRouter<T>;
  typename Router::Buffers buffers;
  if (c.has("state.bias")) buffers.selection_bias = c.values("state.bias");
  RouterRun<Router> run(
      c,
      Router({.width = golden::router_width(c),
              .experts = golden::router_experts(c),
              .k = c.template config<Index>("k"),
              .score = golden::score_named(c.template config<std::string>("score")),
              .groups = c.template config<Index>("n_group"),
              .keep_groups = c.template config<Index>("topk_group"),
              .group_score_top = c.template config<Index>("group_score_top"),
              .fill_zero = c.template config<std::string>("group_fill") == "0",
              .renormalise = c.template config<bool>("renorm"),
              .renorm_epsilon = c.template config<T>("renorm_eps"),
              .route_scale = c.template config<T>("route_scale"),
              .bias = c.has("param.router.bias")}),
      golden::router_weights(c, golden::router_experts(c)), buffers,
      {.x = golden::router_input(c)});
  run.expect_decision();
  c.expect("out.score", run.tape.prob);
  run.add_gate_gradient();
  run.backward();
  run.expect_gradients(run.grad);
}
GOLDEN_KIND("router.deepseek", deepseek);

template <class T>
void sigmoid(Case<T>& c) {
  golden::run_router(c,
                     mole::SigmoidRouter<T>({.width = golden::router_width(c),
                                             .experts = golden::router_experts(c),
                                             .renormalise = c.template config<bool>("renorm"),
                                             .renorm_epsilon = c.template config<T>("renorm_eps"),
                                             .scale = c.template config<T>("scale"),
                                             .bias = c.has("param.router.bias")}));
}
GOLDEN_KIND("router.sigmoid", sigmoid);

template <class T>
void relu(Case<T>& c) {
  using Router = mole::ReluRouter<T>;
  RouterRun<Router> run(c,
                        Router({.width = golden::router_width(c),
                                .experts = golden::router_experts(c),
                                .bias = golden::has_router_bias(c)}),
                        golden::router_weights(c, golden::router_experts(c)), {},
                        {.x = golden::router_input(c)});
  run.expect_decision();
  const T weight = c.template config<T>("l1_coef");
  mole::SparsityLoss<T> loss{weight, c.template config<T>("target_k"), true};
  const MatView<const T> prob = run.tape.prob;
  c.expect("out.loss", mole::sparsity_loss<T>(loss, prob, {}, c.context()));
  c.expect("out.sparsity", mole::sparsity(prob));
  loss.weight *= golden::loss_weight(c);
  mole::sparsity_loss<T>(loss, prob, run.d_tape.prob, c.context());
  run.add_gate_gradient();
  run.backward();
  run.expect_gradients(run.grad);
}
GOLDEN_KIND("router.relu", relu);

template <class T, class Router>
void run_hash(Case<T>& c, const Router& router,
              const typename Router::template Params<const T>& params) {
  const std::vector<std::int32_t> ids = c.ints("in.ids");
  std::vector<std::int32_t> table;
  typename Router::Buffers buffers;
  if (c.has("in.table")) {
    table = c.ints("in.table");
    buffers.table = {table.data(), c.extent("in.table", 0), c.extent("in.table", 1)};
  }
  const Index count = c.extent("in.dgate", 0);
  const MatView<const T> x = c.has("in.x") ? c.matrix("in.x") : golden::zeros(c, count, 1);
  RouterRun<Router> run(c, router, params, buffers, {.x = x, .ids = ids});
  run.expect_decision();
  run.add_gate_gradient();
  run.backward();
  if constexpr (requires { run.grad.weight; }) {
    run.expect_gradients(run.grad);
  } else if (c.has("grad.in.x")) {
    c.expect("grad.in.x", run.dx);
  }
}

template <class T>
void hash(Case<T>& c) {
  const Index k = c.template config<Index>("k"), count = golden::router_experts(c);
  if (c.template config<std::string>("gate") == "one") {
    const Index width = c.has("in.x") ? c.extent("in.x", 1) : 1;
    return run_hash(c, mole::HashRouter<T>({.width = width, .experts = count, .k = k}), {});
  }
  run_hash(c,
           mole::ScoredHashRouter<T>(
               {.width = golden::router_width(c),
                .experts = count,
                .k = k,
                .score = golden::score_named(c.template config<std::string>("score")),
                .renorm_epsilon = c.template config<T>("renorm_eps"),
                .scale = c.template config<T>("scale"),
                .bias = golden::has_router_bias(c)}),
           golden::router_weights(c, count));
}
GOLDEN_KIND("router.hash", hash);

/// m marks the largest score, whatever the gates are.
template <class T>
MatView<T> largest(Case<T>& c, MatView<const T> prob) {
  const MatView<T> mask = golden::zeros(c, prob.rows, prob.cols);
  for (Index t = 0; t < prob.rows; ++t) {
    const auto row = prob.row(t);
    mask(t, std::max_element(row.begin(), row.end()) - row.begin()) = T(1);
  }
  return mask;
}

template <class T, class Router>
void run_llava(Case<T>& c, const Router& router) {
  RouterRun<Router> run(c, router, golden::router_weights(c, golden::router_experts(c)), {},
                        {.x = golden::router_input(c)});
  c.expect("out.gate", run.dense(false));
  c.expect("out.prob", run.tape.prob);
  if (c.has("out.logits")) c.expect("out.logits", run.tape.logits);
  c.expect("out.mask", largest<T>(c, run.tape.prob));
  run.add_gate_gradient();
  run.backward();
  run.expect_gradients(run.grad);
}

template <class T>
void llava_mole(Case<T>& c) {
  const Index w = golden::router_width(c), n = golden::router_experts(c);
  const bool bias = c.has("param.router.bias");
  const std::string gate = c.template config<std::string>("gate");
  if (gate == "one") {
    run_llava(c, mole::HardTopKRouter<T>({.width = w, .experts = n, .bias = bias}));
  } else if (gate == "prob") {
    run_llava(c, mole::DenseRouter<T>({.width = w, .experts = n, .bias = bias}));
  } else {
    c.check(gate == "straight_through", "unknown gate " + gate);
    run_llava(c, mole::StraightThroughRouter<T>(
                     {.width = w, .experts = n, .probes = true, .bias = bias}));
  }
}
GOLDEN_KIND("router.llava_mole", llava_mole);

template <class T>
void noisy_top_k(Case<T>& c) {
  using Router = mole::NoisyTopKRouter<T>;
  const Router router = golden::noisy_router(c, golden::router_width(c), golden::router_experts(c));
  RouterRun<Router> run(
      c, router,
      {golden::router_weights(c, golden::router_experts(c)), {c.matrix("param.noise.weight"), {}}},
      golden::noisy_buffers(c), {.x = golden::router_input(c)});
  golden::run_noisy_losses(c, router, run.routing, run.tape, run.d_tape);
  run.add_gate_gradient();
  run.backward();
  run.expect_gradients(run.grad.router);
  c.expect("grad.param.noise.weight", run.grad.side.weight);
}
GOLDEN_KIND("router.noisy_top_k", noisy_top_k);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// layer.*: every router with LoRA experts on a linear map with a frozen weight.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/capacity.hpp"
#include "golden/kinds/dynmole.hpp"
#include "golden/kinds/layer_run.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/losses/balance.hpp"
#include "mole/losses/entropy.hpp"
#include "mole/losses/importance.hpp"
#include "mole/losses/shifted_balance.hpp"
#include "mole/losses/soft_balance.hpp"
#include "mole/losses/sparsity.hpp"
#include "mole/routers/deepseek.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/hash.hpp"
#include "mole/routers/learned_threshold.hpp"
#include "mole/routers/relu.hpp"
#include "mole/routers/scored_hash.hpp"
#include "mole/routers/switch.hpp"
#include "mole/routers/threshold.hpp"
#include "mole/routers/top_p.hpp"
#include "mole/routers/tsallis.hpp"
#include "mole/routers/unit.hpp"
#include "mole/routing/balance_bias.hpp"

namespace {

using golden::Case;
using golden::Experts;
using golden::experts;
using golden::has_router_bias;
using golden::head;
using golden::LayerRun;
using golden::number;
using golden::width;
using mole::Index;
using mole::MatView;

template <class T>
void dynamic_moe(Case<T>& c) {
  LayerRun<mole::TopPRouter<T>> run(c,
                                    mole::TopPRouter<T>({.width = width(c),
                                                         .experts = experts(c),
                                                         .top_p = number(c, "top_p"),
                                                         .temperature = number(c, "temperature"),
                                                         .bias = has_router_bias(c)}),
                                    head(c));
  run.finish(run.grad.mixture.router);
}
GOLDEN_KIND("layer.dynamic_moe", dynamic_moe);

template <class T>
void dynmole(Case<T>& c) {
  const mole::TsallisRouter<T> router(
      golden::dynmole_config(c, width(c), experts(c), has_router_bias(c)));
  const mole::Entropy<T> how = golden::dynmole_entropy(router);
  LayerRun<mole::TsallisRouter<T>> run(c, router, head(c));
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  const MatView<const T> prob = run.tape.router.prob;
  const T weight = golden::loss_weight(c);
  const T entropy = number(c, "dyn_coef"), balance = number(c, "aux_coef");
  const double epsilon = mask.empty() ? 0 : 1e-8;
  using SoftLayer = mole::SoftBalancedLayer<T>;
  const SoftLayer value[] = {{run.routing, prob, {}, {}}};
  const SoftLayer layer[] = {{run.routing, prob, run.d_tape.gate.row(0), run.d_tape.prob}};
  T loss = mole::entropy_loss<T>({entropy, how}, prob, {}, c.context());
  loss += mole::soft_balance_loss<T>(balance, value, c.context(), {mask}, epsilon);
  c.expect("out.loss", loss);
  mole::entropy_loss<T>({weight * entropy, how}, prob, run.d_tape.prob, c.context());
  mole::soft_balance_loss<T>(weight * balance, layer, c.context(), {mask}, epsilon);
  run.finish(run.grad.mixture.router);
}
GOLDEN_KIND("layer.dynmole", dynmole);

template <class T>
void loramoe(Case<T>& c) {
  LayerRun<mole::DenseRouter<T>> run(
      c,
      mole::DenseRouter<T>({.width = width(c), .experts = experts(c), .bias = has_router_bias(c)}),
      head(c));
  const std::vector<std::int32_t> types = c.ints("in.task_types");
  const auto begin =
      golden::equal_sequences(run.routing.tokens, c.template config<Index>("sequences"));
  mole::LocalisedBalance<T> loss{number(c, "blc_weight"), number(c, "blc_alpha"), types, begin};
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  const MatView<const T> prob = run.tape.router.prob;
  const bool on = loss.weight != T(0);
  const auto value = [&](MatView<T> dprob) {
    return mole::localised_balance_loss<T>(loss, prob, dprob, c.context(), {mask});
  };
  c.expect("out.loss", on ? value({}) : T(0));
  loss.weight *= golden::loss_weight(c);
  if (on) value(run.d_tape.prob);
  run.finish(run.grad.mixture.router);
}
GOLDEN_KIND("layer.loramoe", loramoe);

template <class T>
void mole_threshold(Case<T>& c) {
  LayerRun<mole::ThresholdRouter<T>> run(
      c,
      mole::ThresholdRouter<T>({.width = width(c),
                                .experts = experts(c),
                                .threshold = number(c, "threshold"),
                                .bias = has_router_bias(c)}),
      head(c));
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  mole::BalanceLoss<T> loss{.mask = mask, .count_zero_gates = true};
  const MatView<const T> prob = run.tape.router.prob;
  c.expect("out.loss", mole::balance_loss<T>(loss, run.routing, prob, {}, c.context()));
  loss.weight = golden::loss_weight(c);
  mole::balance_loss<T>(loss, run.routing, prob, run.d_tape.prob, c.context());
  run.finish(run.grad.mixture.router);
}
GOLDEN_KIND("layer.mole_threshold", mole_threshold);

template <class T>
void adamole(Case<T>& c) {
  using Router = mole::LearnedThresholdRouter<T>;
  const Router router({.width = width(c),
                       .experts = experts(c),
                       .max_threshold = number(c, "max_threshold"),
                       .bias = has_router_bias(c)});
  LayerRun<Router> run(
      c, router, {head(c), {c.matrix("param.threshold.weight"), c.matrix("param.threshold.bias")}});
  const auto& tape = run.tape.router;
  std::vector<T> tau, dtau(static_cast<std::size_t>(run.routing.tokens));
  for (Index t = 0; t < run.routing.tokens; ++t) {
    tau.push_back(router.rule().threshold(tape.side(t, 0)));
  }
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  const MatView<const T> prob = tape.prob;
  c.expect("out.threshold", tau);
  c.expect("out.loss", mole::shifted_balance_loss<T>(1, prob, tau, {}, {}, c.context(), {mask}));
  mole::shifted_balance_loss<T>(golden::loss_weight(c), prob, tau, run.d_tape.prob, dtau,
                                c.context(), {mask});
  for (Index t = 0; t < run.routing.tokens; ++t) {
    run.d_tape.side(t, 0) += dtau[t] * router.rule().threshold_slope(tape.side(t, 0));
  }
  const auto& grad = run.grad.mixture.router;
  run.finish(grad.router);
  c.expect("grad.param.threshold.weight", grad.side.weight);
  c.expect("grad.param.threshold.bias", grad.side.bias);
}
GOLDEN_KIND("layer.adamole", adamole);

template <class T>
void relu(Case<T>& c) {
  LayerRun<mole::ReluRouter<T>> run(
      c,
      mole::ReluRouter<T>({.width = width(c), .experts = experts(c), .bias = has_router_bias(c)}),
      head(c));
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  mole::SparsityLoss<T> loss{number(c, "l1_coef"), number(c, "target_k"), true};
  const MatView<const T> prob = run.tape.router.prob;
  c.expect("out.loss", mole::sparsity_loss<T>(loss, prob, {}, c.context(), {mask}));
  if (c.has("out.sparsity")) c.expect("out.sparsity", mole::sparsity(prob));
  loss.weight *= golden::loss_weight(c);
  mole::sparsity_loss<T>(loss, prob, run.d_tape.prob, c.context(), {mask});
  run.finish(run.grad.mixture.router);
}
GOLDEN_KIND("layer.relu", relu);

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
  constexpr bool scored = requires(typename Router::template Params<T> p) {
    p.weight;
  };
  LayerRun<Router> run(c, router, params, buffers, {.x = c.matrix("in.x"), .ids = ids});
  if constexpr (scored) {
    run.finish(run.grad.mixture.router);
  } else {
    run.finish();
  }
}

template <class T>
void hash(Case<T>& c) {
  const Index k = c.template config<Index>("k");
  if (c.template config<std::string>("gate") == "one") {
    return run_hash(c, mole::HashRouter<T>({.width = width(c), .experts = experts(c), .k = k}), {});
  }
  run_hash(c,
           mole::ScoredHashRouter<T>(
               {.width = width(c),
                .experts = experts(c),
                .k = k,
                .score = golden::score_named(c.template config<std::string>("score")),
                .renorm_epsilon = number(c, "renorm_eps"),
                .scale = number(c, "scale"),
                .bias = has_router_bias(c)}),
           head(c));
}
GOLDEN_KIND("layer.hash", hash);

template <class T>
void switch_layer(Case<T>& c) {
  const auto begin =
      golden::equal_sequences(c.extent("in.x", 0), c.template config<Index>("sequences"));
  LayerRun<mole::SwitchRouter<T>> run(
      c,
      mole::SwitchRouter<T>({.width = width(c),
                             .experts = experts(c),
                             .capacity = c.template config<Index>("capacity"),
                             .bias = has_router_bias(c)}),
      head(c), {}, {.x = c.matrix("in.x"), .sequence_begin = begin});
  run.finish(run.grad.mixture.router);
}
GOLDEN_KIND("layer.switch", switch_layer);

template <class T>
void expert_choice(Case<T>& c) {
  LayerRun<mole::ExpertChoiceRouter<T>> run(
      c,
      mole::ExpertChoiceRouter<T>(
          {.width = width(c),
           .experts = experts(c),
           .capacity_factor = c.template config<double>("capacity_factor"),
           .score = golden::expert_choice_score(c.template config<std::string>("score")),
           .bias = has_router_bias(c)}),
      head(c));
  run.finish(run.grad.mixture.router);
}
GOLDEN_KIND("layer.expert_choice", expert_choice);

template <class T>
void top2_capacity(Case<T>& c) {
  using Router = mole::GShardRouter<T>;
  typename Router::Buffers buffers;
  if (c.has("in.uniform")) buffers.uniform = c.values("in.uniform");
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  LayerRun<Router> run(c, golden::gshard_router(c, width(c), experts(c)), head(c), buffers,
                       {.x = c.matrix("in.x"), .mask = mask});
  c.expect("out.location", golden::gshard_locations<T>(c, run.routing, run.tape.router.prob));
  run.finish(run.grad.mixture.router);
}
GOLDEN_KIND("layer.top2_capacity", top2_capacity);

/// Experts that always work, on top of y: their gradients, and their part of dx.
template <class T>
void add_shared_experts(Case<T>& c, MatView<T> y, MatView<T> dx) {
  using Mixture = mole::Mixture<mole::UnitRouter<T>, mole::LoraBank<T>>;
  Experts<T> shared(c, "param.shared.");
  const Mixture layer(
      mole::UnitRouter<T>({.width = width(c), .experts = c.extent("param.shared.A", 0)}),
      mole::LoraBank<T>(shared.config));
  const typename Mixture::Weights weights{{}, shared.weights()};
  const mole::LayerInput<T> input(c.matrix("in.x"));
  auto tape = layer.make_tape(c.memory(), y.rows);
  auto d_tape = layer.router().make_tape(c.memory(), y.rows);
  mole::params::zero(d_tape);
  const auto prepared = layer.prepare(weights, c.memory());
  layer.forward(prepared, {}, input, {}, y, {}, &tape, c.context());
  typename Mixture::template Params<T> grad{{}, shared.gradient()};
  layer.backward(weights, {}, tape, input, {}, c.matrix("in.dy"), d_tape, {}, {.x = dx}, grad, {},
                 c.context());
  shared.expect_gradient();
}

template <class T>
void deepseek(Case<T>& c) {
  using Router = mole::DeepSeekRouter<T>;
  typename Router::Buffers buffers;
  if (c.has("state.bias")) buffers.selection_bias = c.values("state.bias");
  LayerRun<Router> run(
      c,
      Router({.width = width(c),
              .experts = experts(c),
              .k = c.template config<Index>("k"),
              .score = golden::score_named(c.template config<std::string>("score")),
              .groups = c.template config<Index>("n_group"),
              .keep_groups = c.template config<Index>("topk_group"),
              .group_score_top = c.template config<Index>("group_score_top"),
              .fill_zero = c.template config<std::string>("group_fill") == "0",
              .renormalise = c.template config<bool>("renorm"),
              .renorm_epsilon = number(c, "renorm_eps"),
              .route_scale = number(c, "route_scale"),
              .bias = has_router_bias(c)}),
      head(c), buffers);
  if (c.has("out.score")) c.expect("out.score", run.tape.router.prob);
  if (c.has("param.shared.A")) add_shared_experts<T>(c, run.y, run.dx);
  run.finish(run.grad.mixture.router);
}
GOLDEN_KIND("layer.deepseek", deepseek);

}  // namespace

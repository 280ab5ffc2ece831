// SPDX-License-Identifier: Apache-2.0
// layer.*: feed-forward experts behind one router.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/ffn_run.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/layers/adapted_ffn.hpp"
#include "mole/layers/lora.hpp"
#include "mole/layers/pass_through.hpp"
#include "mole/losses/balance.hpp"
#include "mole/losses/choice_balance.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/given.hpp"
#include "mole/routers/hard_top_k.hpp"
#include "mole/routers/one_plus.hpp"
#include "mole/routers/one_plus_by_id.hpp"
#include "mole/routers/straight_through.hpp"
#include "mole/routers/switch.hpp"
#include "mole/routers/top_k.hpp"
#include "mole/routers/top_p.hpp"
#include "mole/routers/unit.hpp"

namespace {

using golden::Case;
using golden::FfnExperts;
using golden::FfnMixture;
using golden::FfnRun;
using golden::ProjectionNames;
using mole::ExpertBase;
using mole::FfnForm;
using mole::Index;
using mole::MatView;

template <class T>
Index width(Case<T>& c) {
  return c.matrix("in.x").cols;
}

template <class T>
T number(Case<T>& c, const char* key) {
  return static_cast<T>(c.template config<double>(key));
}

/// LoRAs on the projections of one frozen block.
template <class T>
FfnExperts<T> adapted_block(Case<T>& c, Index experts) {
  const auto alpha = c.template config<double>("alpha");
  const auto rank = c.template config<Index>("r");
  const bool stabilised = c.template config<std::string>("scaling") == "alpha/sqrt(r)";
  const T scale = static_cast<T>(mole::lora_scale(alpha, rank, stabilised));
  const auto names = [](const std::string& projection) {
    const std::string name = "param." + projection;
    return ProjectionNames{name + ".weight", name + ".bias", name + ".A", name + ".B"};
  };
  const auto make = [&](FfnForm form, const std::string& up, const std::string& down) {
    return FfnExperts<T>(c, form, ExpertBase::shared, experts, names("gate_proj"), names(up),
                         names(down), scale);
  };
  if (c.has("param.fc1.weight")) return make(FfnForm::plain, "fc1", "fc2");
  if (c.has("param.gate_up_proj.weight")) return make(FfnForm::fused, "gate_up_proj", "down_proj");
  return make(FfnForm::gated, "up_proj", "down_proj");
}

/// A mixture with a linear router, whole; `losses(run)` stands between forward and backward.
template <class Router, class T, class Losses>
void run_mixture(Case<T>& c, const Router& router, const FfnExperts<T>& experts, Losses&& losses) {
  using Layer = FfnMixture<Router>;
  const Layer layer(router, mole::FfnBank<T>(experts.config));
  const mole::LayerInput<T> input(c.matrix("in.x"));
  const MatView<T> y = golden::zeros(c, input.x.rows, layer.output_width());
  const MatView<T> dx = golden::zeros(c, input.x.rows, input.x.cols);
  FfnRun<Layer> run(c, layer,
                    {golden::router_weights(c, experts.config.experts), experts.weights()},
                    {router.make_params(c.memory()), experts.gradient()}, input, y);
  run.expect_decision();
  c.expect("out.y", y);
  losses(run);
  run.backward({.x = dx});
  c.expect("grad.in.x", dx);
  golden::expect_head_gradient(c, run.grad.router);
  experts.expect_gradient(c);
}

template <class T>
void mixlora(Case<T>& c) {
  const Index count = c.extent("param.router.weight", 0);
  const mole::TopKRouter<T> router({.width = width(c),
                                    .experts = count,
                                    .k = c.template config<Index>("k"),
                                    .renormalise = c.template config<bool>("renorm"),
                                    .bias = golden::has_router_bias(c)});
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  run_mixture(c, router, adapted_block(c, count), [&](auto& run) {
    if (!c.has("out.loss")) return;
    mole::BalanceLoss<T> loss{.mask = mask, .count_zero_gates = true};
    const MatView<const T> prob = run.tape.router.prob;
    c.expect("out.loss", mole::balance_loss<T>(loss, run.routing, prob, {}, c.context()));
    loss.weight = golden::loss_weight(c);
    mole::balance_loss<T>(loss, run.routing, prob, run.d_tape.prob, c.context());
  });
}
GOLDEN_KIND("layer.mixlora", mixlora);

template <class T>
void mixlora_dynamic(Case<T>& c) {
  const Index count = c.extent("param.router.weight", 0);
  const T temperature = number(c, "temperature");
  const mole::TopPRouter<T> router({.width = width(c),
                                    .experts = count,
                                    .top_p = number(c, "top_p"),
                                    .temperature = temperature == T(0) ? T(1) : temperature,
                                    .bias = golden::has_router_bias(c)});
  run_mixture(c, router, adapted_block(c, count), [](auto&) {});
}
GOLDEN_KIND("layer.mixlora_dynamic", mixlora_dynamic);

/// Tokens that no expert took pass through.
template <class T>
void mixlora_switch(Case<T>& c) {
  using Layer = mole::PassThrough<FfnMixture<mole::SwitchRouter<T>>>;
  const Index count = c.extent("param.router.weight", 0);
  const FfnExperts<T> experts = adapted_block(c, count);
  c.expect_option("inference", false);
  const mole::SwitchRouter<T> router({.width = width(c),
                                      .experts = count,
                                      .capacity = c.template config<Index>("capacity"),
                                      .bias = golden::has_router_bias(c)});
  const Layer layer({router, mole::FfnBank<T>(experts.config)});
  mole::LayerInput<T> input(c.matrix("in.x"));
  const auto begin = golden::equal_sequences(input.x.rows, c.template config<Index>("sequences"));
  input.sequence_begin = begin;
  const MatView<T> y = golden::zeros(c, input.x.rows, input.x.cols);
  const MatView<T> dx = golden::zeros(c, input.x.rows, input.x.cols);
  FfnRun<Layer> run(c, layer, {golden::router_weights(c, count), experts.weights()},
                    {router.make_params(c.memory()), experts.gradient()}, input, y);
  run.expect_decision();
  std::vector<int> dropped;
  for (Index t = 0; t < y.rows; ++t) {
    dropped.push_back(run.routing.token_begin[t] == run.routing.token_begin[t + 1]);
  }
  c.expect("out.dropped", dropped);
  c.expect("out.y", y);
  run.backward({.x = dx});
  c.expect("grad.in.x", dx);
  golden::expect_head_gradient(c, run.grad.router);
  experts.expect_gradient(c);
}
GOLDEN_KIND("layer.mixlora_switch", mixlora_switch);

/// Uni-MoE: the load of its balance loss are first choices, whatever k.
template <class T>
void unimoe(Case<T>& c) {
  const Index count = c.extent("param.router.weight", 0);
  const auto experts = golden::gated_experts(c, "", ExpertBase::own, count, number(c, "scaling"));
  const mole::TopKRouter<T> router({.width = width(c),
                                    .experts = count,
                                    .k = c.template config<Index>("top_k"),
                                    .bias = golden::has_router_bias(c)});
  c.expect_option("balance", "top1");
  c.expect_option("weights", "softmax_over_selected");
  run_mixture(c, router, experts, [&](auto& run) {
    mole::ChoiceBalance<T> loss;
    const MatView<const T> prob = run.tape.router.prob;
    c.expect("out.aux_loss", mole::choice_balance_loss<T>(loss, prob, {}, c.context()));
    loss.weight = number(c, "aux_coef");
    if (loss.weight == T(0)) return;
    mole::choice_balance_loss<T>(loss, prob, run.d_tape.prob, c.context());
  });
}
GOLDEN_KIND("layer.unimoe", unimoe);

template <class T>
void granular_ffn(Case<T>& c) {
  const Index count = c.extent("param.router.weight", 0), k = c.template config<Index>("top_k");
  const FfnExperts<T> experts(c, FfnForm::plain, ExpertBase::own, count, {},
                              {"param.w1", "param.b1", {}, {}}, {"param.w2", "param.b2", {}, {}});
  const auto weights = c.template config<std::string>("weights");
  const auto none = [](auto&) {};
  if (weights == "unit") {
    const mole::HardTopKRouter<T> router({.width = width(c), .experts = count, .k = k});
    return run_mixture(c, router, experts, none);
  }
  if (weights == "one_plus") {
    const mole::OnePlusRouter<T> router({.width = width(c), .experts = count, .k = k});
    return run_mixture(c, router, experts, none);
  }
  c.check(weights == "softmax" || weights == "softmax_times_k", "unknown weights " + weights);
  const T scale = weights == "softmax" ? T(1) : static_cast<T>(k);
  const mole::TopKRouter<T> router({.width = width(c), .experts = count, .k = k, .scale = scale});
  run_mixture(c, router, experts, none);
}
GOLDEN_KIND("layer.granular_ffn", granular_ffn);

/// The expert of every sample is given.
template <class T>
void enforced_routing(Case<T>& c) {
  using Layer = FfnMixture<mole::GivenRouter<T>>;
  const std::vector<std::int32_t> assignment = c.ints("in.assignment");
  const Index count = c.extent("param.wi", 0), sequence = c.extent("in.x", 1);
  const FfnExperts<T> experts(c, FfnForm::fused, ExpertBase::own, count, {},
                              {"param.wi", "param.wi_bias", "param.wi_A", "param.wi_B"},
                              {"param.wo", "param.wo_bias", "param.wo_A", "param.wo_B"},
                              number(c, "scaling"));
  const Layer layer(mole::GivenRouter<T>({.width = width(c), .experts = count}),
                    mole::FfnBank<T>(experts.config));
  mole::LayerInput<T> input(c.matrix("in.x"));
  const MatView<T> gates = golden::zeros(c, input.x.rows, count);
  std::fill_n(gates.data, gates.size(), std::numeric_limits<T>::quiet_NaN());  // not selected
  for (Index t = 0; t < gates.rows; ++t) gates(t, assignment[t / sequence]) = number(c, "weight");
  input.overrides.gates = gates;
  const MatView<T> y = golden::zeros(c, input.x.rows, layer.output_width());
  const MatView<T> dx = golden::zeros(c, input.x.rows, input.x.cols);
  FfnRun<Layer> run(c, layer, {{}, experts.weights()}, {{}, experts.gradient()}, input, y);
  c.expect("out.y", y);
  run.backward({.x = dx});
  c.expect("grad.in.x", dx);
  experts.expect_gradient(c);
}
GOLDEN_KIND("layer.enforced_routing", enforced_routing);

/// One mixture of a sum of several: adds into y and dx. Frozen experts are constants, so x has a
/// gradient through the router alone.
template <class Router, class T>
void add_mixture(Case<T>& c, const Router& router,
                 const typename Router::template Params<const T>& params,
                 const typename Router::template Params<T>& d_params, const FfnExperts<T>& experts,
                 const mole::LayerInput<T>& tokens, bool frozen, MatView<T> y, MatView<T> dx,
                 bool is_routed) {
  using Layer = FfnMixture<Router>;
  const Layer layer(router, mole::FfnBank<T>(experts.config));
  mole::LayerInput<T> input = tokens;
  mole::LayerInputGradient<T> d_input{.x = dx};
  if (frozen) input.router_x = input.x;
  if (frozen) d_input = {.router_x = dx};
  FfnRun<Layer> run(c, layer, {params, experts.weights()},
                    {d_params, frozen ? mole::FfnBankParams<T>{} : experts.gradient()}, input, y);
  if (is_routed) run.expect_decision();
  run.backward(d_input);
  experts.expect_gradient(c);
}

/// The shared expert: one expert, of weight 1 + gate_shared x.
template <class T>
void add_gated_shared_expert(Case<T>& c, bool frozen, MatView<T> y, MatView<T> dx) {
  const MatView<T> d_gate = golden::zeros(c, 1, width(c));
  if (c.has("param.shared.gate") && c.shape("param.shared.gate").front() > 0) {
    const mole::OnePlusRouter<T> router({.width = width(c), .experts = 1, .k = 1});
    const auto shared = golden::gated_experts(c, "shared.", ExpertBase::shared, 1);
    add_mixture<mole::OnePlusRouter<T>, T>(c, router, {c.matrix("param.gate_shared.weight"), {}},
                                           {d_gate, {}}, shared, c.matrix("in.x"), frozen, y, dx,
                                           false);
  }
  c.expect("grad.param.gate_shared.weight", d_gate);
}

template <class T>
MatView<T> zeros_like(Case<T>& c, const std::string& tensor) {
  const MatView<const T> like = c.matrix(tensor);
  return golden::zeros(c, like.rows, like.cols);
}

/// Parameters that have no influence.
template <class T>
void expect_unused(Case<T>& c, const std::vector<std::string>& tensors) {
  for (const std::string& tensor : tensors) {
    if (c.has("grad." + tensor)) c.expect("grad." + tensor, zeros_like(c, "grad." + tensor));
  }
}

template <class T>
void sparse_unified(Case<T>& c) {
  c.expect_option("weights", "one_plus_logit");
  const Index k = c.template config<Index>("top_k");
  const bool frozen = c.template config<bool>("freeze_experts");
  mole::LayerInput<T> input(c.matrix("in.x"));
  const MatView<T> y = golden::zeros(c, input.x.rows, c.matrix("in.dy").cols);
  const MatView<T> dx = golden::zeros(c, input.x.rows, input.x.cols);
  if (k > 0) {
    const Index count = c.extent("param.router.weight", 0);
    const bool by_kind = c.has("param.router_image.weight");
    const Index heads = by_kind ? 2 : 1;
    const mole::OnePlusByIdRouter<T> router(
        {.width = width(c), .experts = count, .k = k, .heads = heads});
    const MatView<T> weight = golden::zeros(c, heads * count, width(c));
    const MatView<T> d_weight = golden::zeros(c, heads * count, width(c));
    const MatView<const T> text = c.matrix("param.router.weight");
    std::copy_n(text.data, text.size(), weight.data);
    std::vector<std::int32_t> is_image;
    if (by_kind) {
      const MatView<const T> image = c.matrix("param.router_image.weight");
      std::copy_n(image.data, image.size(), weight.row_block(count, count).data);
      is_image = c.ints("in.is_image");
      input.ids = is_image;
    }
    const auto experts = golden::gated_experts(c, "", ExpertBase::own, count);
    add_mixture<mole::OnePlusByIdRouter<T>, T>(c, router, {weight, {}}, {d_weight, {}}, experts,
                                               input, frozen, y, dx, true);
    c.expect("grad.param.router.weight", d_weight.row_block(0, count));
    if (by_kind) {
      c.expect("grad.param.router_image.weight", d_weight.row_block(count, count));
    }
  } else {
    expect_unused(c, {"param.router.weight", "param.router_image.weight", "param.gate", "param.up",
                      "param.down"});
    if (c.has("out.gate")) c.expect("out.gate", zeros_like(c, "out.gate"));
  }
  add_gated_shared_expert(c, frozen, y, dx);
  c.expect("out.y", y);
  c.expect("grad.in.x", dx);
}
GOLDEN_KIND("layer.sparse_unified", sparse_unified);

template <class T>
void sparse_unified_ste(Case<T>& c) {
  using Router = mole::StraightThroughRouter<T>;
  c.expect_option("weights", "straight_through_one");
  const Index count = c.extent("param.router.weight", 0);
  const MatView<const T> x = c.matrix("in.x");
  const MatView<T> y = golden::zeros(c, x.rows, x.cols), dx = golden::zeros(c, x.rows, x.cols);
  const MatView<T> d_router = golden::zeros(c, count, x.cols);
  const Router router({.width = x.cols,
                       .experts = count,
                       .k = c.template config<Index>("top_k"),
                       .renormalise = c.template config<bool>("renormalise")});
  add_mixture<Router, T>(c, router, {c.matrix("param.router.weight"), {}}, {d_router, {}},
                         golden::gated_experts(c, "", ExpertBase::own, count), x, false, y, dx,
                         true);
  if (c.has("param.shared.gate")) {
    const mole::UnitRouter<T> always({.width = x.cols, .experts = 1});
    add_mixture<mole::UnitRouter<T>, T>(c, always, {}, {},
                                        golden::gated_experts(c, "shared.", ExpertBase::shared, 1),
                                        x, false, y, dx, false);
  }
  c.expect("out.y", y);
  c.expect("grad.in.x", dx);
  c.expect("grad.param.router.weight", d_router);
}
GOLDEN_KIND("layer.sparse_unified_ste", sparse_unified_ste);

/// A block whose three matrices are mixed one by one.
template <class Router>
void run_llava_mole(Case<typename Router::Scalar>& c, const Router& router) {
  using T = typename Router::Scalar;
  using Layer = mole::AdaptedFfn<Router, mole::LoraBank<T>>;
  const Index count = router.experts();
  const T scale = static_cast<T>(
      mole::lora_scale(c.template config<double>("alpha"), c.template config<Index>("r"),
                       c.template config<std::string>("scaling") == "alpha/sqrt(r)"));
  typename Layer::Weights weights;
  typename Layer::template Params<T> grad;
  weights.router = golden::router_weights(c, count);
  grad.router = router.make_params(c.memory());
  std::vector<golden::Projection<T>> matrices;
  std::vector<mole::LoraBank<T>> banks;
  for (const char* name : {"gate_proj", "up_proj", "down_proj"}) {
    const std::string at = std::string("param.") + name;
    matrices.emplace_back(c, ProjectionNames{at + ".weight", at + ".bias", at + ".A", at + ".B"},
                          ExpertBase::shared, count, scale);
    const auto& m = matrices.back();
    banks.push_back(mole::LoraBank<T>(
        {.in = m.in(), .out = m.out(), .rank = m.adapters.rank, .scale = m.adapters.scale}));
  }
  for (std::size_t m = 0; m < 3; ++m) {
    const auto with = matrices[m].weights();
    weights.matrix[m] = {with.weight_of(0), with.bias_of(0), with.adapter};
    grad.matrix[m].experts = matrices[m].gradient().adapter;
  }
  const Layer layer(router, banks, FfnExperts<T>::activation_of(c));
  const mole::LayerInput<T> input(c.matrix("in.x"));
  const MatView<T> y = golden::zeros(c, input.x.rows, layer.output_width());
  const MatView<T> dx = golden::zeros(c, input.x.rows, input.x.cols);
  FfnRun<Layer> run(c, layer, weights, grad, input, y);
  // The mask of the case marks first choices, whatever the gates.
  const mole::HardTopKRouter<T> first(
      {.width = width(c), .experts = count, .bias = weights.router.bias.data != nullptr});
  golden::RouterRun<mole::HardTopKRouter<T>> choice(c, first, weights.router, {}, {.x = input.x});
  run.expect_gates();
  c.expect("out.mask", choice.dense(true));
  c.expect("out.prob", run.tape.router.prob);
  c.expect("out.y", y);
  if (c.has("out.loss")) {
    const auto begin = golden::equal_sequences(y.rows, c.template config<Index>("sequences"));
    const std::vector<std::uint8_t> mask = golden::token_mask(c);
    mole::BalanceLoss<T> loss{.mask = mask, .by_experts = false, .sequence_begin = begin};
    const MatView<const T> prob = run.tape.router.prob;
    c.expect("out.loss", mole::balance_loss<T>(loss, choice.routing, prob, {}, c.context()));
    loss.weight = golden::loss_weight(c);
    mole::balance_loss<T>(loss, choice.routing, prob, run.d_tape.prob, c.context());
  }
  run.backward({.x = dx});
  c.expect("grad.in.x", dx);
  golden::expect_head_gradient(c, run.grad.router);
  for (const auto& m : matrices) m.expect_gradient(c);
}

template <class T>
void llava_mole(Case<T>& c) {
  const Index count = c.extent("param.router.weight", 0);
  const bool bias = c.has("param.router.bias");
  if (c.template config<bool>("dense_moe")) {
    run_llava_mole(c, mole::DenseRouter<T>({.width = width(c), .experts = count, .bias = bias}));
  } else {
    run_llava_mole(c, mole::HardTopKRouter<T>({.width = width(c), .experts = count, .bias = bias}));
  }
}
GOLDEN_KIND("layer.llava_mole", llava_mole);

}  // namespace

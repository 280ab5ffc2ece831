// SPDX-License-Identifier: Apache-2.0
// MoFME: its block, and its modulation inside an adapter.
#include "mole/layers/mofme.hpp"

#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/experts/modulated_bank.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/routers/tie_top_k.hpp"
#include "mole/routers/top_k.hpp"
#include "mole/routers/uncertainty.hpp"

namespace {

using golden::Case;
using mole::Index;
using mole::MatView;

template <class T>
MatView<T> dense_gate(Case<T>& c, const mole::Routing<T>& routing) {
  const MatView<T> gate = golden::zeros(c, routing.tokens, routing.experts);
  for (Index t = 0; t < routing.tokens; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      gate(t, routing.expert[s]) = routing.gate[s];
    }
  }
  return gate;
}

template <class T>
void mofme(Case<T>& c) {
  using Layer = mole::Mofme<mole::TieTopKRouter<T>>;
  const MatView<const T> x = c.matrix("in.x");
  c.expect_option("activation", "gelu");
  const Layer layer(mole::TieTopKRouter<T>({.width = x.cols,
                                            .experts = c.template config<Index>("num_experts"),
                                            .k = c.template config<Index>("top_k"),
                                            .bias = true}),
                    {.hidden = c.extent("param.ffn.w1", 0),
                     .norm_epsilon = c.template config<T>("norm_eps"),
                     .shifted = c.template config<std::string>("expert_list") == "released"});
  typename Layer::Weights weights;
  typename Layer::template Params<T> grad = layer.make_params(c.memory());
  mole::params::zero(grad);
  std::vector<std::pair<std::string, MatView<T>>> wanted;
  const auto tensor = [&](const char* name, MatView<const T>& to, MatView<T> gradient) {
    to = c.matrix("param." + std::string(name));
    wanted.emplace_back("grad.param." + std::string(name), gradient);
  };
  tensor("norm.weight", weights.norm, grad.norm);
  tensor("norm.bias", weights.shift, grad.shift);
  tensor("wa.weight", weights.gate.weight, grad.gate.weight);
  tensor("wa.bias", weights.gate.bias, grad.gate.bias);
  tensor("wb.weight", weights.value.weight, grad.value.weight);
  tensor("wb.bias", weights.value.bias, grad.value.bias);
  auto& router = weights.mixture.router;
  auto& experts = weights.mixture.experts;
  const auto& d_experts = grad.mixture.experts;
  tensor("router.weight", router.weight, grad.mixture.router.weight);
  tensor("router.bias", router.bias, grad.mixture.router.bias);
  tensor("gamma.weight", experts.gamma_weight, d_experts.gamma_weight);
  tensor("gamma.bias", experts.gamma_bias, d_experts.gamma_bias);
  tensor("beta.weight", experts.beta_weight, d_experts.beta_weight);
  tensor("beta.bias", experts.beta_bias, d_experts.beta_bias);
  tensor("ffn.w1", weights.inner.weight, grad.inner.weight);
  tensor("ffn.b1", weights.inner.bias, grad.inner.bias);
  tensor("ffn.w2", weights.outer.weight, grad.outer.weight);
  tensor("ffn.b2", weights.outer.bias, grad.outer.bias);

  auto tape = layer.make_tape(c.memory(), x.rows);
  auto d_tape = layer.router().make_tape(c.memory(), x.rows);
  mole::params::zero(d_tape);
  const MatView<T> y = golden::zeros(c, x.rows, x.cols), dx = golden::zeros(c, x.rows, x.cols);
  layer.forward(layer.prepare(weights, c.memory()), {}, x, y, tape, c.context());
  c.expect("out.y", y);
  c.expect("out.gate", dense_gate(c, tape.mixture.routing.view()));
  layer.backward(weights, {}, tape, x, c.matrix("in.dy"), d_tape, dx, grad, c.context());
  c.expect("grad.in.x", dx);
  for (const auto& [name, value] : wanted) c.expect(name, value);
}
GOLDEN_KIND("layer.mofme", mofme);

template <class T>
void mofme_lora(Case<T>& c) {
  using Mixture = mole::Mixture<mole::TopKRouter<T>, mole::ModulatedBank<T>>;
  using Layer = mole::AdaptedLinear<Mixture>;
  const MatView<const T> x = c.matrix("in.x");
  const Index experts = c.template config<Index>("num_experts");
  const std::vector<T> scale(static_cast<std::size_t>(experts), c.template config<T>("scaling"));
  const mole::TopKRouter<T> router(
      {.width = x.cols, .experts = experts, .k = c.template config<Index>("top_k")});
  const Layer layer(Mixture(router, mole::ModulatedBank<T>({.in = x.cols,
                                                            .out = c.extent("param.weight", 0),
                                                            .rank = c.extent("param.A", 0),
                                                            .scale = scale})));
  typename Layer::Weights weights{};
  weights.weight = c.matrix("param.weight");
  weights.mixture.router = {c.matrix("param.router.weight"), {}};
  weights.mixture.experts = {c.matrix("param.A"), c.matrix("param.B"), c.matrix("param.gamma"),
                             c.matrix("param.beta")};
  typename Layer::template Params<T> grad{};
  grad.weight = golden::zeros(c, weights.weight.rows, weights.weight.cols);
  grad.mixture.router = router.make_params(c.memory());
  grad.mixture.experts = layer.mixture().experts().template make_params<T>(c.memory());
  mole::params::zero(grad.mixture);
  auto tape = layer.make_tape(c.memory(), x.rows);
  auto d_tape = router.make_tape(c.memory(), x.rows);
  mole::params::zero(d_tape);
  const MatView<T> y = golden::zeros(c, x.rows, layer.output_width());
  const MatView<T> dx = golden::zeros(c, x.rows, x.cols);
  layer.forward(layer.prepare(weights, c.memory()), x, y, &tape, c.context());
  c.expect("out.y", y);
  c.expect("out.gate", dense_gate(c, tape.routing.view()));
  layer.backward(weights, tape, x, c.matrix("in.dy"), d_tape, {.x = dx}, grad, c.context());
  c.expect("grad.in.x", dx);
  if (c.has("grad.param.weight")) c.expect("grad.param.weight", grad.weight);
  c.expect("grad.param.router.weight", grad.mixture.router.weight);
  const auto& d_experts = grad.mixture.experts;
  c.expect("grad.param.A", d_experts.down);
  c.expect("grad.param.B", d_experts.up);
  c.expect("grad.param.gamma", d_experts.gamma);
  c.expect("grad.param.beta", d_experts.beta);
}
GOLDEN_KIND("layer.mofme_lora", mofme_lora);

/// The samples of the case lie sample by sample, those of the tape token by token.
template <class T>
MatView<T> by_sample(Case<T>& c, MatView<const T> rows, Index samples) {
  const Index tokens = c.extent("in.x", 0);
  const MatView<T> turned = golden::zeros(c, samples * tokens, rows.cols);
  for (Index m = 0; m < samples; ++m) {
    for (Index t = 0; t < tokens; ++t) {
      std::ranges::copy(rows.row(t * samples + m), turned.row(m * tokens + t).begin());
    }
  }
  return turned;
}

template <class T>
void mofme_uar(Case<T>& c) {
  using Router = mole::UncertaintyRouter<T>;
  const MatView<const T> x = c.matrix("in.x");
  const std::string mode = c.template config<std::string>("mode");
  const Index samples = c.template config<Index>("samples");
  const Router router({.width = x.cols,
                       .experts = c.template config<Index>("num_experts"),
                       .samples = samples,
                       .k = c.template config<Index>("top_k"),
                       .gates = mode == "mc_mean"  ? mole::UncertaintyGates::mean
                                : mode == "mc_snr" ? mole::UncertaintyGates::snr
                                                   : mole::UncertaintyGates::whiten,
                       .epsilon = c.template config<T>("eps"),
                       .ridge = c.template config<T>("ridge")});
  const auto keep = c.mask("in.keep");
  const MatView<T> factor = golden::zeros(c, samples * x.rows, x.cols);
  for (std::size_t i = 0; i < keep.size(); ++i) {
    factor.data[i] = static_cast<T>(keep[i] / (1 - c.template config<double>("drop")));
  }
  golden::RouterRun<Router> run(c, router,
                                {c.matrix("param.router.weight"), c.matrix("param.router.bias")},
                                {factor}, {.x = x});
  c.expect("out.gate", run.dense(false));
  c.expect("out.mean", run.tape.prob);
  c.expect("out.variance", run.tape.variance);
  c.expect("out.samples", by_sample<T>(c, run.tape.samples, samples));
  if (c.has("out.whitened")) {
    c.expect("out.whitened", by_sample<T>(c, run.tape.whitened, samples));
  }
  run.add_gate_gradient();
  run.backward();
  run.expect_gradients(run.grad);
}
GOLDEN_KIND("router.mofme_uar", mofme_uar);

}  // namespace

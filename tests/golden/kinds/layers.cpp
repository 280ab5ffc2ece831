// SPDX-License-Identifier: Apache-2.0
// layer.*: mixtures on a linear map with a frozen weight. lora.*: plain LoRA on a linear map, its
// gradients and its merged weights.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/layer_run.hpp"
#include "mole/algebra/merge.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/experts/shared_down_bank.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/lora.hpp"
#include "mole/losses/balance.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/top_k.hpp"

namespace {

using golden::Case;
using mole::Index;
using mole::MatView;

/// A matrix of the case's memory, filled with one value.
template <class T>
MatView<T> filled(Case<T>& c, Index rows, Index cols, T value) {
  const MatView<T> made = c.memory().template take<T>(rows, cols);
  for (Index i = 0; i < made.size(); ++i) made.data[i] = value;
  return made;
}

template <class T>
MatView<T> zeros_like(Case<T>& c, MatView<const T> shape) {
  return filled(c, shape.rows, shape.cols, T(0));
}

template <class T>
MatView<T> copied(Case<T>& c, MatView<const T> from) {
  const MatView<T> made = zeros_like(c, from);
  for (Index i = 0; i < from.size(); ++i) made.data[i] = from.data[i];
  return made;
}

template <class T>
MatView<const T> optional_matrix(Case<T>& c, const std::string& tensor) {
  return c.has(tensor) ? c.matrix(tensor) : MatView<const T>{};
}

/// Pointers to the matrices of every expert inside tensors of three dimensions.
template <class V>
struct ExpertPointers {
  std::vector<V*> down, up;

  ExpertPointers(Index experts, MatView<V> a, MatView<V> b) {
    for (Index e = 0; e < experts; ++e) {
      if (!a.empty()) down.push_back(a.row_block(e * a.rows / experts, 1).data);
      up.push_back(b.row_block(e * b.rows / experts, 1).data);
    }
  }
};

/// One forward and the memory of one backward.
template <class T, class M>
struct Run {
  using Layer = mole::AdaptedLinear<M>;

  const Layer& layer;
  const typename Layer::Weights& weights;
  mole::LayerInput<T> input;
  typename Layer::Tape tape;
  typename Layer::RouterTape d_tape;
  MatView<T> y, dx;

  Run(Case<T>& c, const Layer& of, const typename Layer::Weights& with,
      const mole::LayerInput<T>& reads)
      : layer(of), weights(with), input(reads) {
    const Index tokens = input.x.rows;
    const auto prepared = layer.prepare(weights, c.memory());
    tape = layer.make_tape(c.memory(), tokens);
    d_tape = layer.router().make_tape(c.memory(), tokens);
    mole::params::zero(d_tape);
    dx = zeros_like(c, input.x);
    y = filled(c, tokens, layer.output_width(), std::numeric_limits<T>::quiet_NaN());
    const MatView<T> inferred = copied<T>(c, y);
    layer.forward(prepared, input, y, &tape, c.context());
    layer.forward(prepared, input, inferred, nullptr, c.context());
    c.check_same_bits(std::span(y.data, y.size()), std::span(inferred.data, inferred.size()),
                      "forward with a tape and without differ");
    c.expect("out.y", y);
  }

  void backward(Case<T>& c, const typename Layer::template Params<T>& grad) {
    layer.backward(weights, tape, input, c.matrix("in.dy"), d_tape, {.x = dx}, grad, c.context());
    c.expect("grad.in.x", dx);
  }
};

template <class T>
void expect_routing(Case<T>& c, const mole::Routing<T>& routing, MatView<const T> logits) {
  const MatView<T> gate = filled(c, routing.tokens, routing.experts, T(0));
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(gate.size()));
  for (Index t = 0; t < routing.tokens; ++t) {
    for (Index slot = routing.token_begin[t]; slot < routing.token_begin[t + 1]; ++slot) {
      gate(t, routing.expert[slot]) = routing.gate[slot];
      mask[t * routing.experts + routing.expert[slot]] = 1;
    }
  }
  c.expect("out.gate", gate);
  if (c.has("out.mask")) c.expect("out.mask", mask);
  c.expect("out.logits", logits);
}

/// out.loss, and its gradient into the tape.
template <class T, class M>
void expect_loss(Case<T>& c, Run<T, M>& run, mole::LoadPer load_per) {
  if (!c.has("out.loss")) return;
  const mole::Routing<T> routing = run.tape.routing.view();
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  mole::BalanceLoss<T> loss{.load_per = load_per, .mask = mask, .count_zero_gates = true};
  c.expect("out.loss",
           mole::balance_loss(loss, routing, run.tape.router.prob, MatView<T>{}, c.context()));
  loss.weight = golden::loss_weight(c);
  mole::balance_loss(loss, routing, run.tape.router.prob, run.d_tape.prob, c.context());
}

/// A router with one matrix and experts of two matrices on a frozen linear map.
template <class T>
void run_top_k(Case<T>& c, typename mole::TopKRouter<T>::Order order, mole::LoadPer load_per) {
  using Mixture = mole::Mixture<mole::TopKRouter<T>, mole::LoraBank<T>>;
  using Layer = mole::AdaptedLinear<Mixture>;
  const MatView<const T> a = c.matrix("param.A"), b = c.matrix("param.B");
  const Index experts = c.extent("param.A", 0), rank = b.cols;
  typename mole::TopKRouter<T>::Config routing;
  routing.width = a.cols;
  routing.experts = experts;
  routing.k = c.template config<Index>("k");
  routing.score = golden::score_named(c.config("score", std::string("softmax")));
  routing.order = order;
  routing.renormalise = c.template config<bool>("renorm");
  routing.renorm_epsilon = c.config("renorm_eps", T(0));
  routing.temperature = c.config("temperature", T(1));
  routing.scale = c.config("scale", T(1));
  routing.bias = golden::has_router_bias(c);
  typename mole::LoraBank<T>::Config bank;
  bank.in = a.cols;
  bank.out = c.extent("param.B", 1);
  bank.rank.assign(experts, rank);
  bank.scale.assign(experts, static_cast<T>(golden::scale_of(c, rank)));
  const Layer layer{Mixture{mole::TopKRouter<T>(routing), mole::LoraBank<T>(bank)}};

  const ExpertPointers<const T> parts(experts, a, b);
  const typename Layer::Weights weights{c.matrix("param.weight"),
                                        optional_matrix(c, "param.bias"),
                                        {golden::router_weights(c, experts),
                                         {bank.in, bank.out, bank.rank, parts.down, parts.up, {}}}};
  const MatView<T> da = zeros_like(c, a), db = zeros_like(c, b);
  const ExpertPointers<T> gradients(experts, da, db);
  typename Layer::template Params<T> grad;
  grad.mixture.router = layer.router().make_params(c.memory());
  mole::params::zero(grad.mixture.router);
  grad.mixture.experts = {bank.in, bank.out, bank.rank, gradients.down, gradients.up, {}};

  mole::LayerInput<T> input(c.matrix("in.x"));
  const golden::Masked<T> masked(c, experts);
  input.overrides = masked.overrides;
  Run<T, Mixture> run(c, layer, weights, input);
  expect_routing<T>(c, run.tape.routing.view(),
                    golden::head_logits(c, layer.router(), weights.mixture.router, {}, {input.x}));
  expect_loss(c, run, load_per);
  run.backward(c, grad);
  golden::expect_head_gradient(c, grad.mixture.router);
  c.expect("grad.param.A", da);
  c.expect("grad.param.B", db);
}

template <class T>
void mola(Case<T>& c) {
  run_top_k(c, mole::TopKRouter<T>::Order::score_then_topk, mole::LoadPer::selection);
}

template <class T>
void top_k(Case<T>& c) {
  using Order = typename mole::TopKRouter<T>::Order;
  const bool after = c.template config<std::string>("order") == "topk_then_score";
  run_top_k(c, after ? Order::topk_then_score : Order::score_then_topk, mole::LoadPer::token);
}

template <class T>
void hydralora(Case<T>& c) {
  using Mixture = mole::Mixture<mole::DenseRouter<T>, mole::SharedDownBank<T>>;
  using Layer = mole::AdaptedLinear<Mixture>;
  const MatView<const T> a = c.matrix("param.A"), b = c.matrix("param.B");
  const Index experts = c.extent("param.B", 0), out = c.extent("param.B", 1);
  typename mole::SharedDownBank<T>::Config bank;
  bank.in = a.cols;
  bank.out = out;
  bank.rank = a.rows;
  bank.scale.assign(experts, static_cast<T>(golden::scale_of(c, a.rows)));
  const mole::DenseRouter<T> router({.width = a.cols,
                                     .experts = experts,
                                     .temperature = c.config("temperature", T(1)),
                                     .bias = golden::has_router_bias(c)});
  const Layer layer{Mixture{router, mole::SharedDownBank<T>(bank)}};

  const ExpertPointers<const T> parts(experts, {}, b);
  const typename Layer::Weights weights{c.matrix("param.weight"),
                                        optional_matrix(c, "param.bias"),
                                        {golden::router_weights(c, experts), {a, out, parts.up}}};
  const MatView<T> db = zeros_like(c, b);
  const ExpertPointers<T> gradients(experts, {}, db);
  typename Layer::template Params<T> grad;
  grad.mixture.router = layer.router().make_params(c.memory());
  mole::params::zero(grad.mixture.router);
  grad.mixture.experts = {zeros_like(c, a), out, gradients.up};

  Run<T, Mixture> run(c, layer, weights, c.matrix("in.x"));
  expect_routing<T>(c, run.tape.routing.view(), run.tape.router.logits);
  run.backward(c, grad);
  golden::expect_head_gradient(c, grad.mixture.router);
  c.expect("grad.param.A", grad.mixture.experts.down);
  c.expect("grad.param.B", db);
}

/// One adapter of a case: its tensors end in `suffix`.
template <class T>
struct Adapter {
  std::string suffix;
  Index rank;
  T scale;
  bool active;
  MatView<const T> down, up, bias;
  MatView<T> ddown, dup, dbias;

  Adapter(Case<T>& c, const nlohmann::json& config, const std::string& end, bool is_active)
      : suffix(end), rank(config.at("r").get<Index>()), active(is_active) {
    if (config.value("use_dora", false)) throw std::runtime_error("DoRA is not supported");
    const double wanted = mole::lora_scale(config.at("lora_alpha").get<double>(), rank,
                                           config.at("use_rslora").get<bool>());
    c.check(wanted == config.at("scaling").get<double>(), "lora_scale differs from scaling");
    scale = static_cast<T>(wanted);
    down = c.matrix("param.A" + suffix);
    up = c.matrix("param.B" + suffix);
    bias = optional_matrix(c, "param.lora_bias" + suffix);
    if (bias.empty()) bias = filled(c, 1, up.rows, T(0));
    ddown = zeros_like(c, down);
    dup = zeros_like(c, up);
    dbias = zeros_like(c, bias);
  }
};

template <class T>
struct AdapterPointers {
  std::vector<const T*> down, up, bias;
  std::vector<T*> ddown, dup, dbias;

  AdapterPointers(const std::vector<Adapter<T>>& adapters, bool with_bias) {
    for (const Adapter<T>& a : adapters) {
      down.push_back(a.down.data), up.push_back(a.up.data);
      ddown.push_back(a.ddown.data), dup.push_back(a.dup.data);
      if (with_bias) bias.push_back(a.bias.data), dbias.push_back(a.dbias.data);
    }
  }
};

/// W and b with every active adapter folded in `sign` times.
template <class T>
void fold(const std::vector<Adapter<T>>& adapters, T sign, bool fan_in_fan_out, MatView<T> weight,
          MatView<T> bias) {
  const T one = 1;
  for (const Adapter<T>& a : adapters) {
    if (!a.active) continue;
    mole::merge_lora(a.down, a.up, sign * a.scale, weight, fan_in_fan_out);
    const MatView<const T> column(a.bias.data, a.bias.cols, 1);  // the bias is a product of rank 1
    if (!bias.empty()) {
      mole::merge_lora(MatView<const T>(&one, 1, 1), column, sign * a.scale,
                       MatView<T>(bias.data, bias.cols, 1));
    }
  }
}

template <class T>
void expect_merged(Case<T>& c, const std::vector<Adapter<T>>& adapters, bool fan_in_fan_out) {
  const MatView<T> delta = zeros_like(c, c.matrix("param.weight"));
  fold<T>(adapters, T(1), fan_in_fan_out, delta, {});
  if (c.has("out.delta")) c.expect("out.delta", delta);
  if (!c.has("out.merged_weight")) return;
  const MatView<T> weight = copied(c, c.matrix("param.weight"));
  const MatView<T> bias = c.has("param.bias") ? copied(c, c.matrix("param.bias")) : MatView<T>{};
  fold(adapters, T(1), fan_in_fan_out, weight, bias);
  c.expect("out.merged_weight", weight);
  if (!bias.empty()) c.expect("out.merged_bias", bias);
  fold(adapters, T(-1), fan_in_fan_out, weight, bias);
  c.expect("param.weight", weight);
  if (!bias.empty()) c.expect("param.bias", bias);
}

/// The linear map of the case with all its adapters; those that are not active are forbidden.
template <class T>
void run_lora(Case<T>& c, const std::vector<Adapter<T>>& adapters, bool fan_in_fan_out,
              MatView<const T> dropout) {
  using Layer = mole::AdaptedLinear<mole::Lora<T>>;
  typename mole::Lora<T>::Config config;
  config.in = adapters.front().down.cols;
  config.out = adapters.front().up.rows;
  std::vector<std::uint8_t> forbidden;
  for (const Adapter<T>& a : adapters) {
    config.rank.push_back(a.rank);
    config.scale.push_back(a.scale);
    config.bias = config.bias || c.has("param.lora_bias" + a.suffix);
    forbidden.push_back(a.active ? 0 : 1);
  }
  const Layer layer(mole::Lora<T>(config), {.fan_in_fan_out = fan_in_fan_out});
  const AdapterPointers<T> at(adapters, config.bias);
  const typename Layer::Weights weights{
      c.matrix("param.weight"),
      optional_matrix(c, "param.bias"),
      {{}, {config.in, config.out, config.rank, at.down, at.up, at.bias}}};
  typename Layer::template Params<T> grad;
  grad.weight = zeros_like(c, weights.weight);
  if (!weights.bias.empty()) grad.bias = zeros_like(c, weights.bias);
  grad.mixture.experts = {config.in, config.out, config.rank, at.ddown, at.dup, at.dbias};

  mole::LayerInput<T> input(c.matrix("in.x"));
  input.dropout = dropout;
  input.overrides.forbidden = {forbidden.data(), 1, static_cast<Index>(forbidden.size())};
  Run<T, mole::Lora<T>> run(c, layer, weights, input);
  run.backward(c, grad);
  c.expect("grad.param.weight", grad.weight);
  if (!grad.bias.empty()) c.expect("grad.param.bias", grad.bias);
  // Of an adapter that is not active the gradients are zeros, or not in the case.
  for (const Adapter<T>& a : adapters) {
    const auto expect = [&](const char* tensor, MatView<T> gradient) {
      const std::string name = tensor + a.suffix;
      if (!c.has("param." + name) || !(a.active || c.has("grad.param." + name))) return;
      c.expect("grad.param." + name, gradient);
    };
    expect("A", a.ddown);
    expect("B", a.dup);
    expect("lora_bias", a.dbias);
  }
  expect_merged(c, adapters, fan_in_fan_out);
}

template <class T>
void lora_linear(Case<T>& c) {
  const std::vector<Adapter<T>> adapters = {Adapter<T>(c, c.config(), "", true)};
  MatView<T> dropout;
  if (c.template config<bool>("training") && c.has("in.dropout_mask")) {
    const double keep = 1 / (1 - c.template config<double>("lora_dropout"));
    dropout = copied(c, c.matrix("in.dropout_mask"));
    for (Index i = 0; i < dropout.size(); ++i) dropout.data[i] *= static_cast<T>(keep);
  }
  run_lora<T>(c, adapters, c.template config<bool>("fan_in_fan_out"), dropout);
}

template <class T>
void lora_multi(Case<T>& c) {
  const auto active = c.template config<std::vector<std::string>>("active");
  std::vector<Adapter<T>> adapters;
  for (const nlohmann::json& config : c.config().at("adapters")) {
    const auto name = config.at("name").get<std::string>();
    const bool is_active = std::find(active.begin(), active.end(), name) != active.end();
    adapters.emplace_back(c, config, "." + name, is_active);
  }
  run_lora<T>(c, adapters, false, {});
}

GOLDEN_KIND("layer.mola", mola);
GOLDEN_KIND("layer.top_k", top_k);
GOLDEN_KIND("layer.hydralora", hydralora);
GOLDEN_KIND("lora.linear", lora_linear);
GOLDEN_KIND("lora.multi", lora_multi);

}  // namespace

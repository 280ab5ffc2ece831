// SPDX-License-Identifier: Apache-2.0
// Routers that go by likeness to prototypes, and what is built on them.
#include <algorithm>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/ffn_run.hpp"
#include "golden/kinds/layer_run.hpp"
#include "mole/layers/payload_lookup.hpp"
#include "mole/losses/balance.hpp"
#include "mole/losses/pull.hpp"
#include "mole/losses/routing_contrastive.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/prototype.hpp"
#include "mole/routers/prototype_choice.hpp"
#include "mole/routers/unit.hpp"

namespace {

using golden::Case;
using golden::Experts;
using golden::MixtureRun;
using mole::Index;
using mole::MatView;

mole::PrototypeWeight weight_of(const std::string& name) {
  if (name == "identity" || name == "cosine") return mole::PrototypeWeight::cosine;
  if (name == "sigmoid") return mole::PrototypeWeight::sigmoid;
  if (name == "softmax") return mole::PrototypeWeight::softmax;
  throw std::invalid_argument("unknown weight " + name);
}

/// The samples of a case: rows are sample-major.
struct Samples {
  template <class T>
  explicit Samples(Case<T>& c)
      : count(c.extent("in.x", 0)),
        length(c.extent("in.x", 1)),
        routed(c.template config<Index>("num_routed_experts")),
        has_unconditional(c.template config<bool>("use_uncond_expert")),
        unconditional_id(c.template config<std::int32_t>("uncond_label")),
        begin(golden::equal_sequences(count * length, count)) {
    for (const std::int32_t label : c.ints("in.labels")) {
      const bool apart = has_unconditional && label == unconditional_id;
      conditional += !apart;
      ids.insert(ids.end(), static_cast<std::size_t>(length), label);
      mask.insert(mask.end(), static_cast<std::size_t>(length), apart ? 0 : 1);
    }
  }
  Index rows() const { return count * length; }
  Index experts() const { return routed + (has_unconditional ? 1 : 0); }

  Index count, length, routed, conditional = 0;
  bool has_unconditional;
  std::int32_t unconditional_id;
  std::vector<std::int32_t> begin, ids;
  std::vector<std::uint8_t> mask;  ///< 1 = of a conditional sample
};

template <class Router, class T>
Router prototype_router(Case<T>& c, const Samples& samples) {
  return Router({.width = c.extent("param.prototypes", 1),
                 .experts = samples.experts(),
                 .k = c.template config<Index>("top_k"),
                 .weight = weight_of(c.template config<std::string>("weight")),
                 .unconditional = samples.has_unconditional,
                 .unconditional_id = samples.unconditional_id});
}

/// The balance loss of the conditional samples.
template <class T>
T balance(Case<T>& c, const Samples& samples, const mole::Routing<T>& routing,
          MatView<const T> prob, MatView<T> dprob) {
  const T weight = c.template config<T>("balance_coef") * static_cast<T>(samples.routed);
  mole::BalanceLoss<T> loss{.weight = weight,
                            .mask = samples.mask,
                            .count_zero_gates = true,
                            .load_divisor = c.template config<T>("top_k"),
                            .by_experts = false};
  if (c.template config<bool>("balance_per_sequence") && samples.conditional > 0) {
    loss.sequence_begin = samples.begin;
    loss.weight *= static_cast<T>(samples.count) / static_cast<T>(samples.conditional);
  }
  return mole::balance_loss<T>(loss, routing, prob, dprob, c.context());
}

/// The slots as the case lists them: an unconditional row has its expert in every place, with
/// weight 1 in the first alone.
template <class T>
struct Slots {
  Slots(Case<T>& c, const Samples& samples, const mole::Routing<T>& routing,
        MatView<const T> logits)
      : k(c.template config<Index>("top_k")),
        selected(golden::selected_by<T>(routing, logits, k)),
        weights(selected.size()),
        slot(selected.size(), -1) {
    for (std::size_t i = 0; i < selected.size(); ++i) {
      const Index t = static_cast<Index>(i) / k;
      if (selected[i] < 0) selected[i] = static_cast<std::int32_t>(samples.routed);
      if (samples.mask[static_cast<std::size_t>(t)] == 0 && static_cast<Index>(i) % k > 0) continue;
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        if (routing.expert[s] != selected[i]) continue;
        weights[i] = routing.gate[s];
        slot[i] = s;
      }
    }
    c.expect("out.selected", selected);
    c.expect("out.weights", weights);
  }
  Index k;
  std::vector<std::int32_t> selected;
  std::vector<T> weights;
  std::vector<Index> slot;
};

template <class T>
void promoe_router(Case<T>& c) {
  using Router = mole::PrototypeRouter<T>;
  const Samples samples(c);
  golden::RouterRun<Router> run(c, prototype_router<Router>(c, samples),
                                {c.matrix("param.prototypes")}, {},
                                {.x = c.matrix("in.x"), .ids = samples.ids});
  const Slots<T> slots(c, samples, run.routing, run.tape.logits);
  const std::span<const T> dweights = c.values("in.dweights");
  for (std::size_t i = 0; i < slots.slot.size(); ++i) {
    if (slots.slot[i] >= 0) run.d_tape.gate(0, slots.slot[i]) += dweights[i];
  }
  if (c.template config<double>("balance_coef") != 0) {
    c.expect("out.balance", balance<T>(c, samples, run.routing, run.tape.prob, run.d_tape.prob));
  }
  run.backward();
  c.expect("grad.in.x", run.dx);
  c.expect("grad.param.prototypes", run.grad.prototypes);
}
GOLDEN_KIND("router.promoe", promoe_router);

/// The expert that always works, on top of y: its part of y and of dx.
template <class T, class Bank>
void add_shared(Case<T>& c, const Bank& bank, const typename Bank::Weights& weights,
                const typename Bank::template Params<T>& gradient, MatView<T> y, MatView<T> dx) {
  using Router = mole::UnitRouter<T>;
  MixtureRun<Router, Bank> run(c, {Router({.width = bank.input_width(), .experts = 1}), bank},
                               {{}, weights}, gradient, c.matrix("in.x"));
  run.backward();
  for (Index t = 0; t < y.rows; ++t) {
    for (Index i = 0; i < y.cols; ++i) y(t, i) += run.y(t, i);
    for (Index i = 0; i < dx.cols; ++i) dx(t, i) += run.dx(t, i);
  }
}

template <class T>
mole::RoutingContrast contrast_of(Case<T>& c) {
  return {.weight = c.template config<double>("rcl_lambda"),
          .temperature = c.template config<double>("rcl_temperature"),
          .first_only = !c.template config<bool>("rcl_top_k")};
}

/// Two-matrix experts with biases.
template <class T>
golden::FfnExperts<T> mlp_experts(Case<T>& c, const std::string& prefix, Index experts) {
  return {c,
          mole::FfnForm::plain,
          mole::ExpertBase::own,
          experts,
          {},
          {prefix + "up", prefix + "up_bias", {}, {}},
          {prefix + "down", prefix + "down_bias", {}, {}}};
}

/// A layer with any of the prototype routers: `more(run)` expects what is its own and adds losses.
template <class Router, class T, class More>
void promoe_layer(Case<T>& c, const Samples& samples, More more) {
  mole::LayerInput<T> input(c.matrix("in.x"));
  input.sequence_begin = samples.begin;
  input.ids = samples.ids;
  const bool has_shared = c.template config<bool>("use_shared_expert");
  const auto run_with = [&](const auto& experts, const auto& bank, auto share) {
    MixtureRun<Router, std::remove_cvref_t<decltype(bank)>> run(
        c, {prototype_router<Router>(c, samples), bank},
        {{c.matrix("param.prototypes")}, experts.weights()}, experts.gradient(), input);
    c.expect("out.gate", run.gate);
    more(run);
    run.backward();
    if (has_shared) share(run.y, run.dx);
    c.expect("out.y", run.y);
    c.expect("grad.in.x", run.dx);
    c.expect("grad.param.prototypes", run.grad.router.prototypes);
  };
  if (c.template config<std::string>("experts") == "mlp") {
    using Bank = mole::FfnBank<T>;
    const auto experts = mlp_experts(c, "param.", samples.experts());
    run_with(experts, Bank(experts.config), [&](MatView<T> y, MatView<T> dx) {
      const auto shared = mlp_experts(c, "param.shared.", 1);
      add_shared<T>(c, Bank(shared.config), shared.weights(), shared.gradient(), y, dx);
      shared.expect_gradient(c);
    });
    return experts.expect_gradient(c);
  }
  using Bank = mole::LoraBank<T>;
  Experts<T> experts(c, "param.");
  run_with(experts, Bank(experts.config), [&](MatView<T> y, MatView<T> dx) {
    Experts<T> shared(c, "param.shared.");
    add_shared<T>(c, Bank(shared.config), shared.weights(), shared.gradient(), y, dx);
    shared.expect_gradient();
  });
  experts.expect_gradient();
}

template <class T>
void promoe(Case<T>& c) {
  const Samples samples(c);
  promoe_layer<mole::PrototypeRouter<T>>(c, samples, [&](auto& run) {
    Slots<T>(c, samples, run.routing, run.tape.router.logits);
    const mole::RoutingContrast contrast = contrast_of(c);
    const T added = balance<T>(c, samples, run.routing, run.tape.router.prob, run.d_tape.prob);
    const T pulled = mole::routing_contrastive_loss<T>(contrast, c.matrix("in.x"), run.routing,
                                                       c.matrix("param.prototypes"), run.dx,
                                                       run.grad.router.prototypes, c.context());
    if (c.has("out.aux_loss")) c.expect("out.aux_loss", added + pulled);
  });
}
GOLDEN_KIND("layer.promoe", promoe);

template <class T>
void promoe_choice(Case<T>& c) {
  const Samples samples(c);
  promoe_layer<mole::PrototypeChoiceRouter<T>>(c, samples, [&](auto& run) {
    mole::RoutingContrast contrast = contrast_of(c);
    contrast.first_only = false;
    contrast.sequence_begin = samples.begin;
    const T pulled = mole::routing_contrastive_loss<T>(contrast, c.matrix("in.x"), run.routing,
                                                       c.matrix("param.prototypes"), run.dx,
                                                       run.grad.router.prototypes, c.context());
    if (c.has("out.aux_loss")) c.expect("out.aux_loss", pulled);
  });
}
GOLDEN_KIND("layer.promoe_ec", promoe_choice);

template <class T>
void contrastive(Case<T>& c) {
  const MatView<const T> x = c.matrix("in.x"), prototypes = c.matrix("param.prototypes");
  const std::vector<std::int32_t> assigned = c.ints("in.assign");
  const Index k = static_cast<Index>(assigned.size()) / x.rows;
  mole::RoutingTable<T> table(c.memory(), x.rows, prototypes.rows, std::min(k, prototypes.rows));
  table.begin(x.rows);
  const std::vector<T> gates(static_cast<std::size_t>(k), T(1));
  for (Index t = 0; t < x.rows; ++t) {
    std::vector<std::int32_t> row(assigned.begin() + t * k, assigned.begin() + (t + 1) * k);
    std::sort(row.begin(), row.end());
    row.erase(std::unique(row.begin(), row.end()), row.end());
    table.select(t, row, std::span<const T>(gates).first(row.size()));
  }
  table.finish();
  const MatView<T> dx = golden::zeros(c, x.rows, x.cols),
                   dprototypes = golden::zeros(c, prototypes.rows, prototypes.cols);
  c.expect("out.loss", mole::routing_contrastive_loss<T>(
                           {.temperature = c.template config<double>("temperature")}, x,
                           table.view(), prototypes, dx, dprototypes, c.context()));
  c.expect("grad.in.x", dx);
  c.expect("grad.param.prototypes", dprototypes);
}
GOLDEN_KIND("loss.routing_contrastive", contrastive);

/// A bank of stored values: experts of rank 0 whose bias is the value.
template <class T>
class Values {
 public:
  explicit Values(Case<T>& c)
      : c_(c), values_(c.matrix("param.values")), d_(golden::zeros(c, values_.rows, values_.cols)) {
    config.in = 1;
    config.out = values_.cols;
    config.rank.assign(static_cast<std::size_t>(values_.rows), 0);
    config.scale.assign(static_cast<std::size_t>(values_.rows), T(1));
    config.bias = true;
    for (Index e = 0; e < values_.rows; ++e) {
      bias_.push_back(values_.row(e).data());
      d_bias_.push_back(d_.row(e).data());
    }
    nothing_.assign(bias_.size(), nullptr);
    d_nothing_.assign(bias_.size(), nullptr);
  }
  mole::LoraBankParams<const T> weights() const {
    return {config.in, config.out, config.rank, nothing_, nothing_, bias_};
  }
  mole::LoraBankParams<T> gradient() const {
    return {config.in, config.out, config.rank, d_nothing_, d_nothing_, d_bias_};
  }
  void expect_gradient() { c_.expect("grad.param.values", d_); }

  typename mole::LoraBank<T>::Config config;

 private:
  Case<T>& c_;
  MatView<const T> values_;
  MatView<T> d_;
  std::vector<const T*> bias_, nothing_;
  std::vector<T*> d_bias_, d_nothing_;
};

mole::PrototypeWeight read_out(const std::string& name) {
  if (name == "softmax_of_cosine") return mole::PrototypeWeight::softmax;
  if (name == "softmax") return mole::PrototypeWeight::softmax_of_selected;
  if (name == "unit") return mole::PrototypeWeight::unit;
  return weight_of(name);
}

template <class T>
void adapter_bank(Case<T>& c) {
  using Router = mole::PrototypeRouter<T>;
  Values<T> values(c);
  const bool all = c.template config<std::string>("select") == "all";
  const Index entries = c.extent("param.keys", 0);
  const Index k = all ? entries : c.template config<Index>("top_n");
  const Router router({.width = c.extent("in.query", 1),
                       .experts = entries,
                       .k = k,
                       .weight = read_out(c.template config<std::string>("weight"))});
  mole::LayerInput<T> input(golden::zeros(c, c.extent("in.query", 0), 1));
  input.router_x = c.matrix("in.query");
  MixtureRun<Router> run(c, {router, mole::LoraBank<T>(values.config)},
                         {{c.matrix("param.keys")}, values.weights()}, values.gradient(), input);
  c.expect("out.scores", run.tape.router.logits);
  c.expect("out.gate", run.gate);
  c.expect("out.y", run.y);
  if (c.has("out.selected")) {
    c.expect("out.selected", golden::selected_by<T>(run.routing, run.tape.router.logits, k));
  }
  run.backward();
  c.expect("grad.in.query", run.d_router_x);
  c.expect("grad.param.keys", run.grad.router.prototypes);
  values.expect_gradient();
}
GOLDEN_KIND("router.adapter_bank", adapter_bank);

template <class T>
void payload(Case<T>& c) {
  using Adapter = mole::Mixture<mole::DenseRouter<T>, mole::LoraBank<T>>;
  using Layer = mole::PayloadLookup<Adapter>;
  Experts<T> experts(c, "param.");
  const MatView<const T> query = c.matrix("in.query"), stored = c.matrix("param.payload");
  const Index entries = c.extent("param.payload", 0), rows = c.extent("param.payload", 1);
  const Layer layer(mole::PrototypeRouter<T>({.width = query.cols,
                                              .experts = entries,
                                              .k = c.template config<Index>("top_n"),
                                              .weight = mole::PrototypeWeight::unit}),
                    {mole::DenseRouter<T>({.width = query.cols, .experts = golden::experts(c)}),
                     mole::LoraBank<T>(experts.config)},
                    rows);
  const typename Layer::Weights weights{
      {c.matrix("param.keys")}, stored, {golden::head(c), experts.weights()}};
  const auto prepared = layer.prepare(weights, c.memory());
  auto tape = layer.make_tape(c.memory(), query.rows);
  const MatView<T> y = golden::zeros(c, layer.output_rows(query.rows), layer.width());
  layer.forward(prepared, query, y, &tape, c.context());
  c.expect("out.y", y);
  c.expect("out.selected", tape.entry);
  const Index repeats = layer.output_rows(1);
  const MatView<const T> gate(tape.adapter.routing.view().gate.data(), query.rows,
                              golden::experts(c), repeats * golden::experts(c));
  c.expect("out.gate", gate);

  auto d_lookup = layer.lookup().make_tape(c.memory(), query.rows);
  auto d_adapter = layer.adapter().router().make_tape(c.memory(), y.rows);
  mole::params::zero(d_lookup);
  mole::params::zero(d_adapter);
  const MatView<const T> logits = tape.lookup.logits;
  c.expect("out.pull_loss", mole::pull_loss<T>(1, tape.found.view(), logits, {}));
  mole::pull_loss<T>(c.template config<T>("pull_coef"), tape.found.view(), logits, d_lookup.logits);
  typename Layer::template Params<T> grad{
      {golden::zeros(c, entries, query.cols)},
      golden::zeros(c, stored.rows, stored.cols),
      {layer.adapter().router().make_params(c.memory()), experts.gradient()}};
  mole::params::zero(grad.adapter.router);
  const MatView<T> dquery = golden::zeros(c, query.rows, query.cols);
  layer.backward(weights, tape, query, c.matrix("in.dy"), d_lookup, d_adapter, dquery, grad,
                 c.context());
  c.expect("grad.in.query", dquery);
  c.expect("grad.param.keys", grad.lookup.prototypes);
  c.expect("grad.param.payload", grad.payload);
  c.expect("grad.param.router.weight", grad.adapter.router.weight);
  experts.expect_gradient();
}
GOLDEN_KIND("layer.unirag_payload", payload);

}  // namespace

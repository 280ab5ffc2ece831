// SPDX-License-Identifier: Apache-2.0
// Layers of LoRA experts whose router decides by phase, by sequence, by context or by a pathway.
#include <algorithm>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/lora_experts.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/losses/balance.hpp"
#include "mole/losses/entropy.hpp"
#include "mole/losses/soft_balance.hpp"
#include "mole/losses/supervised.hpp"
#include "mole/routers/lora_mixer.hpp"
#include "mole/routers/mova.hpp"
#include "mole/routers/pathway.hpp"
#include "mole/routers/sequence.hpp"

namespace {

using golden::Case;
using mole::Index;
using mole::MatView;

/// A mixture of LoRA experts on one case.
template <class Router>
class Run {
 public:
  using T = typename Router::Scalar;
  using Mixture = mole::Mixture<Router, mole::LoraBank<T>>;
  using Params = typename Router::template Params<const T>;
  using Carry = typename Router::template Carry<const T>;

  Run(Case<T>& c, const Router& router, const Params& params, const mole::LayerInput<T>& in,
      const typename Router::Buffers& buffers = {}, const Carry& carry = {})
      : c_(c),
        experts_(c),
        layer_(router, mole::LoraBank<T>(experts_.config)),
        weights_{params, experts_.weights()},
        buffers_(buffers),
        carry_(carry),
        input(in) {
    const Index count = input.x.rows;
    tape = layer_.make_tape(c.memory(), count);
    d_tape = router.make_tape(c.memory(), count);
    mole::params::zero(d_tape);
    y = golden::zeros(c, count, layer_.output_width());
    dx = golden::zeros(c, count, input.x.cols);
    grad.router = router.make_params(c.memory());
    mole::params::zero(grad.router);
    grad.experts = experts_.gradient();
  }

  /// Adds into y.
  void forward() {
    const auto prepared = layer_.prepare(weights_, c_.memory());
    layer_.forward(prepared, buffers_, input, carry_, y, {}, &tape, c_.context());
    routing = tape.routing.view();
    gate = golden::zeros(c_, routing.tokens, routing.experts);
    for (Index t = 0; t < routing.tokens; ++t) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        gate(t, routing.expert[s]) = routing.gate[s];
      }
    }
  }

  void backward(const typename Router::template Carry<T>& d_carry = {}) {
    layer_.backward(weights_, buffers_, tape, input, carry_, c_.matrix("in.dy"), d_tape, {},
                    {.x = dx}, grad, d_carry, c_.context());
    c_.expect("grad.in.x", dx);
    experts_.expect_gradient();
  }

  /// The experts of token t, the larger gate first, then the lower expert.
  std::vector<std::int32_t> selected(Index t) const {
    std::vector<std::int32_t> chosen(routing.expert.begin() + routing.token_begin[t],
                                     routing.expert.begin() + routing.token_begin[t + 1]);
    std::ranges::stable_sort(
        chosen, [&](std::int32_t a, std::int32_t b) { return gate(t, a) > gate(t, b); });
    return chosen;
  }

 private:
  Case<T>& c_;
  golden::LoraExperts<T> experts_;
  Mixture layer_;
  typename Mixture::Weights weights_;
  typename Router::Buffers buffers_;
  Carry carry_;

 public:
  mole::LayerInput<T> input;
  typename Mixture::Tape tape;
  typename Router::Tape d_tape;
  typename Mixture::template Params<T> grad{};
  MatView<T> y, dx, gate;
  mole::Routing<T> routing;
};

template <class T>
T number(Case<T>& c, const char* key) {
  return c.template config<T>(key);
}

/// Input of sequences of equal length.
template <class T>
mole::LayerInput<T> sequences(Case<T>& c, const std::vector<std::int32_t>& begin) {
  mole::LayerInput<T> input(c.matrix("in.x"));
  input.sequence_begin = begin;
  return input;
}
template <class T>
std::vector<std::int32_t> begins(Case<T>& c) {
  return golden::equal_sequences(c.matrix("in.x").rows, c.extent("in.x", 0));
}
/// The first row of every sequence, as a matrix that shares the memory.
template <class V>
MatView<V> firsts(MatView<V> rows, Index sequences) {
  return {rows.data, sequences, rows.cols, rows.stride * (rows.rows / sequences)};
}

/// The base map below the mixture, and the loss on the router.
template <class T>
void lora_mixer(Case<T>& c) {
  using Router = mole::LoraMixerRouter<T>;
  const std::string phase = c.template config<std::string>("phase");
  const bool hard = phase == "hard", sparse = phase == "topk";
  const MatView<const T> x = c.matrix("in.x"), weight = c.matrix("param.weight");
  const Index experts = c.template config<Index>("num_experts");
  typename Router::Config config{.width = x.cols, .experts = experts};
  config.phase = hard     ? mole::MixerPhase::hard
                 : sparse ? mole::MixerPhase::top_k
                          : mole::MixerPhase::soft;
  config.k = sparse ? c.template config<Index>("top_k") : 1;
  config.renormalise = c.template config<bool>("renormalise");
  std::vector<std::int32_t> domain;
  mole::LayerInput<T> input(x);
  if (hard) domain = c.ints("in.domain"), input.ids = domain;
  const bool routed = c.has("param.router.weight");
  const MatView<const T> head = routed ? c.matrix("param.router.weight")
                                       : MatView<const T>(golden::zeros(c, experts, x.cols));
  Run<Router> run(c, Router(config), {head, {}}, input);
  const mole::Panels<T> panels = mole::rows::pack(weight, c.memory());
  mole::dense::forward<T>(panels, {}, x, run.y, c.context());
  run.forward();
  c.expect("out.y", run.y);
  c.expect("out.gate", run.gate);
  if (routed && c.has("out.logits")) c.expect("out.logits", run.tape.router.logits);
  if (c.has("out.selected")) {
    std::vector<std::int32_t> selected;
    for (Index t = 0; t < x.rows; ++t) {
      const auto chosen = run.selected(t);
      selected.insert(selected.end(), chosen.begin(), chosen.end());
    }
    c.expect("out.selected", selected);
  }
  if (c.template config<bool>("aux")) {
    const std::string usage = c.template config<std::string>("usage");
    const Index k = usage == "topk" ? c.template config<Index>("usage_k") : 1;
    const MatView<const T> prob = run.tape.router.prob;
    const MatView<T> dprob = run.d_tape.prob;
    // The usage is counted on the k largest scores, whatever the phase.
    const mole::LoraMixerRouter<T> counter(
        {.width = x.cols, .experts = experts, .phase = mole::MixerPhase::top_k, .k = k});
    mole::RoutingTable<T> table(c.memory(), x.rows, experts, k);
    counter.forward(counter.prepare({head, {}}, c.memory()), {}, {.x = x}, {}, {}, table, {},
                    nullptr, c.context());
    const mole::BalanceLoss<T> balance{.weight = number(c, "alpha"),
                                       .count_zero_gates = true,
                                       .load_divisor = static_cast<T>(k),
                                       .by_experts = false};
    const mole::EntropyLoss<T> entropy{-number(c, "lambda"),
                                       {mole::EntropyKind::shannon, T(1), T(0), false}};
    const T used = usage == "square"
                       ? mole::square_usage_loss<T>(balance.weight, prob, dprob, c.context())
                       : mole::balance_loss<T>(balance, table.view(), prob, dprob, c.context());
    c.expect("out.aux_loss", used + mole::entropy_loss<T>(entropy, prob, dprob, c.context()));
  }
  mole::dense::input_gradient<T>(weight, c.matrix("in.dy"), run.dx, c.context());
  run.backward();
  if (routed) c.expect("grad.param.router.weight", run.grad.router.weight);
  if (c.has("grad.param.weight")) {
    const MatView<T> dweight = golden::zeros(c, weight.rows, weight.cols);
    mole::dense::weight_gradient<T>(x, c.matrix("in.dy"), dweight, c.context());
    c.expect("grad.param.weight", dweight);
  }
}
GOLDEN_KIND("layer.lora_mixer", lora_mixer);

template <class T>
void sentence_switch(Case<T>& c) {
  using Router = mole::SequenceRouter<T>;
  c.expect_option("pool", "mean");
  c.expect_option("weight", 1.0);
  const auto begin = begins(c);
  const Index count = c.extent("in.x", 0);
  Run<Router> run(
      c, Router({.width = c.extent("in.x", 2), .experts = c.template config<Index>("num_experts")}),
      {c.matrix("param.router.weight"), {}}, sequences(c, begin));
  run.forward();
  c.expect("out.y", run.y);
  const MatView<const T> logits = firsts(run.tape.router.logits, count);
  c.expect("out.logits", logits);
  std::vector<std::int32_t> selected;
  for (Index b = 0; b < count; ++b) selected.push_back(run.selected(begin[b]).front());
  c.expect("out.selected", selected);
  const T coef = number(c, "aux_coef");
  const std::string aux = c.template config<std::string>("aux");
  if (aux == "specified_expert") {
    const auto domain = c.ints("in.domain");
    c.expect("out.aux_loss", mole::domain_loss<T>(1, logits, domain, {}, c.context()));
    mole::domain_loss<T>(coef, logits, domain, firsts(run.d_tape.logits, count), c.context());
  } else if (aux == "balance_top1") {
    const MatView<const T> prob = run.tape.router.prob;
    c.expect("out.aux_loss", mole::balance_loss<T>({}, run.routing, prob, {}, c.context()));
    mole::balance_loss<T>({.weight = coef}, run.routing, prob, run.d_tape.prob, c.context());
  }
  run.backward();
  c.expect("grad.param.router.weight", run.grad.router.weight);
}
GOLDEN_KIND("layer.sentence_switch", sentence_switch);

template <class T>
void dmoerm_router(Case<T>& c) {
  using Router = mole::SequenceRouter<T>;
  const auto begin = begins(c);
  const MatView<const T> x = c.matrix("in.x");
  const Index count = c.extent("in.x", 0), experts = c.extent("out.probs", 1);
  const Router router(
      {.width = x.cols, .experts = experts, .pool = mole::Pool::last, .bias = true});
  std::vector<std::uint8_t> mask;
  if (c.has("in.mask")) mask = c.mask("in.mask");
  const mole::Tokens<T> tokens{.x = x, .sequence_begin = begin, .mask = mask};
  const typename Router::template Params<const T> params{c.matrix("param.weight"),
                                                         c.matrix("param.bias")};
  mole::RoutingTable<T> table(c.memory(), x.rows, experts, 1);
  auto tape = router.make_tape(c.memory(), x.rows), d_tape = router.make_tape(c.memory(), x.rows);
  mole::params::zero(d_tape);
  router.forward(router.prepare(params, c.memory()), {}, tokens, {}, {}, table, {}, &tape,
                 c.context());
  const mole::Routing<T> routing = table.view();
  std::vector<std::int32_t> category;
  for (Index n = 0; n < count; ++n) {
    category.push_back(routing.expert[routing.token_begin[begin[n]]]);
  }
  c.expect("out.category", category);
  c.expect("out.probs", firsts(tape.prob, count));
  mole::rows::copy<T>(c.matrix("in.dgate"), firsts(d_tape.prob, count));
  const MatView<T> dx = golden::zeros(c, x.rows, x.cols);
  const auto grad = router.make_params(c.memory());
  mole::params::zero(grad);
  router.backward(params, {}, tape, tokens, {}, {}, routing, d_tape, {}, dx, grad, {}, c.context());
  c.expect("grad.in.x", dx);
  c.expect("grad.param.weight", grad.weight);
  c.expect("grad.param.bias", grad.bias);
}
GOLDEN_KIND("router.dmoerm", dmoerm_router);

template <class T>
void mova(Case<T>& c) {
  using Router = mole::MovaRouter<T>;
  c.expect_option("activation", "gelu");
  const auto begin = begins(c);
  const MatView<const T> x = c.matrix("in.x"), context = c.matrix("in.context");
  const Index count = c.extent("in.x", 0), experts = c.template config<Index>("num_experts");
  const Router router({.width = x.cols,
                       .experts = experts,
                       .context = context.cols,
                       .hidden = c.extent("param.gate.w1", 0),
                       .k = c.template config<Index>("top_k")});
  const auto mask = c.mask("in.mask");
  std::vector<std::uint8_t> forbidden;
  for (Index t = 0; t < x.rows; ++t) {
    for (Index e = 0; e < experts; ++e) {
      forbidden.push_back(mask[t / (x.rows / count) * experts + e] == 0);
    }
  }
  mole::LayerInput<T> input = sequences(c, begin);
  input.overrides.forbidden = {forbidden.data(), x.rows, experts};
  Run<Router> run(c, router,
                  {{c.matrix("param.gate.w1"), c.matrix("param.gate.b1")},
                   {c.matrix("param.gate.w2"), c.matrix("param.gate.b2")}},
                  input, {}, {context});
  mole::rows::copy<T>(x, run.y);
  run.forward();
  c.expect("out.y", run.y);
  c.expect("out.gate", firsts(run.gate, count));
  const MatView<T> d_context = golden::zeros(c, context.rows, context.cols);
  mole::rows::copy<T>(c.matrix("in.dy"), run.dx);
  run.backward({d_context});
  c.expect("grad.in.context", d_context);
  c.expect("grad.param.gate.w1", run.grad.router.inner.weight);
  c.expect("grad.param.gate.b1", run.grad.router.inner.bias);
  c.expect("grad.param.gate.w2", run.grad.router.outer.weight);
  c.expect("grad.param.gate.b2", run.grad.router.outer.bias);
  for (Index b = 0; b < count; ++b) {
    const auto row = std::span(mask).subspan(static_cast<std::size_t>(b * experts),
                                             static_cast<std::size_t>(experts));
    if (std::ranges::count(row, std::uint8_t{0}) < experts) continue;
    for (Index t = begin[b]; t < begin[b + 1]; ++t) {
      c.check_same_bits(std::span<const T>(run.y.row(t)), x.row(t), "an empty mask leaves y = x");
    }
  }
}
GOLDEN_KIND("layer.mova", mova);

template <class T>
void c3po_override(Case<T>& c) {
  using Router = mole::PathwayRouter<T>;
  c.expect_option("rows", "last_of_each_sequence");
  const MatView<const T> x = c.matrix("in.x");
  const auto begin = begins(c);
  const bool follows = c.template config<bool>("override");
  std::vector<std::uint8_t> last(static_cast<std::size_t>(x.rows)), present;
  typename Router::Buffers buffers;
  if (follows) {
    for (std::size_t b = 1; b < begin.size(); ++b) last[begin[b] - 1] = 1;
    present = c.mask("in.present");
    buffers = {last, present};
  }
  Run<Router> run(c,
                  Router({.width = x.cols,
                          .experts = c.template config<Index>("num_experts"),
                          .k = c.template config<Index>("top_k"),
                          .renormalise = c.template config<bool>("renormalise"),
                          .floor = number(c, "floor")}),
                  {c.matrix("param.router.weight"), {}}, x, buffers,
                  {follows ? c.matrix("in.override") : MatView<const T>()});
  run.forward();
  c.expect("out.y", run.y);
  c.expect("out.gate", run.gate);
  c.expect("out.logits", run.tape.router.logits);
}
GOLDEN_KIND("layer.c3po_override", c3po_override);

template <class T>
void pathway_override(Case<T>& c) {
  using Router = mole::PathwayRouter<T>;
  const MatView<const T> x = c.matrix("in.x"), pathway = c.matrix("in.override");
  const auto on = c.mask("in.rows"), core = c.mask("in.core");
  const bool all = c.template config<std::string>("override_selection") == "core";
  Run<Router> run(c,
                  Router({.width = x.cols,
                          .experts = pathway.cols,
                          .k = c.template config<Index>("top_k"),
                          .renormalise = c.template config<bool>("renormalise"),
                          .gates = all ? mole::PathwayGates::core : mole::PathwayGates::top_core}),
                  {c.matrix("param.router.weight"), {}}, x, {on, core}, {pathway});
  run.forward();
  c.expect("out.y", run.y);
  c.expect("out.gate", run.gate);
  const MatView<T> d_pathway = golden::zeros(c, 1, pathway.cols);
  run.backward({d_pathway});
  c.expect("grad.in.override", d_pathway);
  c.expect("grad.param.router.weight", run.grad.router.weight);
}
GOLDEN_KIND("layer.pathway_override", pathway_override);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// router.top_k and router.dense_softmax.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "mole/core/params.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/top_k.hpp"

namespace {

using golden::Case;
using mole::Index;
using mole::LinearParams;
using mole::MatView;

template <class T>
MatView<T> zeros(Case<T>& c, Index rows, Index cols) {
  const MatView<T> view = c.memory().template take<T>(rows, cols);
  std::fill_n(view.data, view.size(), T(0));
  return view;
}

/// Logits that are given pass through an identity as weight: exact, and dx is their gradient.
template <class T>
LinearParams<const T> weights(Case<T>& c, Index experts) {
  if (c.has("in.x")) {
    LinearParams<const T> params{c.matrix("param.router.weight"), {}};
    if (c.has("param.router.bias")) params.bias = c.matrix("param.router.bias");
    return params;
  }
  const MatView<T> identity = zeros(c, experts, experts);
  for (Index e = 0; e < experts; ++e) identity(e, e) = T(1);
  return {identity, {}};
}

template <class T>
MatView<const T> input(Case<T>& c) {
  return c.matrix(c.has("in.x") ? "in.x" : "in.logits");
}

template <class T, class Router>
void run(Case<T>& c, const Router& router, const typename Router::Buffers& buffers) {
  const Index count = c.extent("in.dgate", 0), experts = router.experts();
  const LinearParams<const T> params = weights(c, experts);
  const mole::Tokens<T> tokens{.x = input(c)};
  mole::Overrides<T> overrides;
  std::vector<std::uint8_t> forbidden;
  if (c.has("in.expert_mask")) {
    forbidden = c.mask("in.expert_mask");
    overrides.forbidden = {forbidden.data(), static_cast<Index>(forbidden.size()) / experts,
                           experts};
  }
  const auto prepared = router.prepare(params, c.memory());
  mole::RoutingTable<T> table(c.memory(), count, experts, router.max_per_token());
  auto tape = router.make_tape(c.memory(), count), d_tape = router.make_tape(c.memory(), count);
  mole::params::zero(d_tape);
  router.forward(prepared, buffers, tokens, overrides, {}, table, {}, &tape, c.context());

  const mole::Routing<T> routing = table.view();
  const MatView<T> gate = zeros(c, count, experts), mask = zeros(c, count, experts);
  for (Index t = 0; t < count; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      gate(t, routing.expert[s]) = routing.gate[s];
      mask(t, routing.expert[s]) = T(1);
      d_tape.gate(0, s) = c.matrix("in.dgate")(t, routing.expert[s]);
    }
  }
  c.expect("out.gate", gate);
  c.expect("out.mask", mask);
  if (c.has("out.logits")) c.expect("out.logits", tape.logits);

  const MatView<T> dx = zeros(c, count, router.input_width());
  LinearParams<T> grad{zeros(c, params.weight.rows, params.weight.cols), {}};
  if (params.bias.data != nullptr) grad.bias = zeros(c, 1, experts);
  router.backward(params, buffers, tape, tokens, overrides, {}, routing, d_tape, {}, dx, grad, {},
                  c.context());
  if (c.has("in.x")) {
    c.expect("grad.in.x", dx);
    c.expect("grad.param.router.weight", grad.weight);
    if (grad.bias.data != nullptr) c.expect("grad.param.router.bias", grad.bias);
  } else {
    c.expect("grad.in.logits", dx);
    c.expect("grad.in.logits", d_tape.logits);
  }
}

mole::Score score(const std::string& name) {
  if (name == "softmax") return mole::Score::softmax;
  if (name == "sigmoid") return mole::Score::sigmoid;
  if (name == "sqrtsoftplus") return mole::Score::sqrt_softplus;
  throw std::invalid_argument("unknown score " + name);
}

template <class T>
void top_k(Case<T>& c) {
  using Router = mole::TopKRouter<T>;
  const bool scores_first = c.template config<std::string>("order") == "score_then_topk";
  const Router router(
      {.width = input(c).cols,
       .experts = c.extent("in.dgate", 1),
       .k = c.template config<Index>("k"),
       .score = score(c.template config<std::string>("score")),
       .order = scores_first ? Router::Order::score_then_topk : Router::Order::topk_then_score,
       .renormalise = c.template config<bool>("renorm"),
       .renorm_epsilon = c.template config<T>("renorm_eps"),
       .temperature = c.template config<T>("temperature"),
       .scale = c.template config<T>("scale"),
       .bias = c.has("param.router.bias")});
  typename Router::Buffers buffers;
  if (c.has("state.bias")) buffers.selection_bias = c.values("state.bias");
  run(c, router, buffers);
}
GOLDEN_KIND("router.top_k", top_k);

template <class T>
void dense_softmax(Case<T>& c) {
  run(c,
      mole::DenseRouter<T>({.width = input(c).cols,
                            .experts = c.extent("in.dgate", 1),
                            .temperature = c.template config<T>("temperature"),
                            .bias = c.has("param.router.bias")}),
      {});
}
GOLDEN_KIND("router.dense_softmax", dense_softmax);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// One router on one golden case: forward, the dense form of its decision, backward.
#pragma once

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "mole/core/params.hpp"
#include "mole/routing/head.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/score.hpp"

namespace golden {

using mole::LinearParams;

template <class T>
MatView<T> zeros(Case<T>& c, Index rows, Index cols) {
  const MatView<T> view = c.memory().template take<T>(rows, cols);
  std::fill_n(view.data, view.size(), T(0));
  return view;
}

/// Logits that are given pass through an identity as weight: exact, and dx is their gradient.
template <class T>
LinearParams<const T> router_weights(Case<T>& c, Index experts) {
  if (c.has("param.router.weight")) {
    LinearParams<const T> params{c.matrix("param.router.weight"), {}};
    if (c.has("param.router.bias")) params.bias = c.matrix("param.router.bias");
    return params;
  }
  const MatView<T> identity = zeros(c, experts, experts);
  for (Index e = 0; e < experts; ++e) identity(e, e) = T(1);
  return {identity, {}};
}

template <class T>
bool has_router_bias(Case<T>& c) {
  return c.has("param.router.bias");
}

/// Of out.loss in the scalar that is differentiated.
template <class T>
T loss_weight(Case<T>& c) {
  return c.config("loss_weight", T(0));
}

/// What a loss sees of the tokens; empty: all.
template <class T>
std::vector<std::uint8_t> token_mask(Case<T>& c) {
  return c.has("in.mask") ? c.mask("in.mask") : std::vector<std::uint8_t>();
}

template <class T>
MatView<const T> router_input(Case<T>& c) {
  return c.matrix(c.has("in.x") ? "in.x" : "in.logits");
}

template <class T>
Index router_width(Case<T>& c) {
  return router_input(c).cols;
}

template <class T>
Index router_experts(Case<T>& c) {
  return c.extent("in.dgate", 1);
}

inline mole::Score score_named(const std::string& name) {
  if (name == "softmax") return mole::Score::softmax;
  if (name == "sigmoid") return mole::Score::sigmoid;
  if (name == "sqrtsoftplus") return mole::Score::sqrt_softplus;
  throw std::invalid_argument("unknown score " + name);
}

/// Overrides with the experts that the case forbids.
template <class T>
class Masked {
 public:
  Masked(Case<T>& c, Index experts) {
    if (!c.has("in.expert_mask")) return;
    forbidden_ = c.mask("in.expert_mask");
    const auto size = static_cast<Index>(forbidden_.size());
    overrides.forbidden = {forbidden_.data(), size / experts, experts};
  }
  mole::Overrides<T> overrides;

 private:
  std::vector<std::uint8_t> forbidden_;
};

/// Gradients of a linear head.
template <class T>
void expect_head_gradient(Case<T>& c, const LinearParams<T>& head) {
  c.expect("grad.param.router.weight", head.weight);
  if (has_router_bias(c)) c.expect("grad.param.router.bias", head.bias);
}

/// `sequences` equal sequences.
inline std::vector<std::int32_t> equal_sequences(Index tokens, Index sequences) {
  std::vector<std::int32_t> begin;
  for (Index s = 0; s <= sequences; ++s) {
    begin.push_back(static_cast<std::int32_t>(tokens * s / sequences));
  }
  return begin;
}

/// Places of the kept slots: those of `first` come before the others of the same expert.
template <class T, class First>
MatView<T> locations(Case<T>& c, const mole::Routing<T>& routing, const std::vector<Index>& order,
                     First first) {
  const MatView<T> location = zeros(c, routing.tokens, routing.experts);
  std::fill_n(location.data, location.size(), T(-1));
  std::vector<int> used(static_cast<std::size_t>(routing.experts));
  for (const bool of_first : {true, false}) {
    for (const Index t : order) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        const Index e = routing.expert[s];
        if (first(t, e) == of_first) location(t, e) = static_cast<T>(used[e]++);
      }
    }
  }
  return location;
}

inline std::vector<Index> ascending(Index count) {
  std::vector<Index> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), Index{0});
  return order;
}

/// The experts of every token by falling key, `k` a token, -1 where there is none.
template <class T>
std::vector<std::int32_t> selected_by(const mole::Routing<T>& routing, MatView<const T> key,
                                      Index k) {
  std::vector<std::int32_t> all;
  for (Index t = 0; t < routing.tokens; ++t) {
    std::vector<std::int32_t> row(routing.expert.begin() + routing.token_begin[t],
                                  routing.expert.begin() + routing.token_begin[t + 1]);
    std::stable_sort(row.begin(), row.end(),
                     [&](std::int32_t a, std::int32_t b) { return key(t, a) > key(t, b); });
    row.resize(static_cast<std::size_t>(k), -1);
    all.insert(all.end(), row.begin(), row.end());
  }
  return all;
}

/// The logits of the head: those of a tape are -inf where the caller forbids an expert.
template <class Router, class T>
MatView<const T> head_logits(Case<T>& c, const Router& router,
                             const typename Router::template Params<const T>& params,
                             const typename Router::Buffers& buffers,
                             const mole::Tokens<T>& tokens) {
  auto tape = router.make_tape(c.memory(), tokens.count());
  mole::RoutingTable<T> table(c.memory(), tokens.count(), router.experts(), router.max_per_token());
  router.forward(router.prepare(params, c.memory()), buffers, tokens, {}, {}, table, {}, &tape,
                 c.context());
  return tape.logits;
}

template <class Router>
class RouterRun {
 public:
  using T = typename Router::Scalar;
  using Params = typename Router::template Params<const T>;
  using Gradient = typename Router::template Params<T>;

  RouterRun(Case<T>& c, const Router& router, const Params& params,
            const typename Router::Buffers& buffers, const mole::Tokens<T>& tokens,
            const mole::Overrides<T>& overrides = {})
      : c_(c),
        router_(router),
        params_(params),
        buffers_(buffers),
        tokens_(tokens),
        overrides_(overrides),
        prepared_(router.prepare(params, c.memory())),
        table_(c.memory(), tokens.count(), router.experts(), router.max_per_token()),
        tape(router.make_tape(c.memory(), tokens.count())),
        d_tape(router.make_tape(c.memory(), tokens.count())),
        dx(zeros(c, tokens.count(), router.input_width())),
        grad(router.make_params(c.memory())) {
    mole::params::zero(d_tape);
    mole::params::zero(grad);
    router.forward(prepared_, buffers_, tokens_, overrides_, {}, table_, {}, &tape, c.context());
    routing = table_.view();
  }

  MatView<T> dense(bool mask) const {
    const MatView<T> out = zeros(c_, routing.tokens, routing.experts);
    for (Index t = 0; t < routing.tokens; ++t) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        out(t, routing.expert[s]) = mask ? T(1) : routing.gate[s];
      }
    }
    return out;
  }

  void expect_decision() {
    c_.expect("out.gate", dense(false));
    if (c_.has("out.mask")) c_.expect("out.mask", dense(true));
    if (c_.has("out.logits")) {
      const bool all = overrides_.forbidden.data == nullptr;
      c_.expect("out.logits",
                all ? tape.logits : head_logits(c_, router_, params_, buffers_, tokens_));
    }
    if (c_.has("out.prob")) c_.expect("out.prob", tape.prob);
  }

  /// And that of the scores, where the case has one by expert.
  void add_gate_gradient() {
    if (c_.has("in.dprob") && c_.shape("in.dprob").size() == 2) {
      const MatView<const T> dprob = c_.matrix("in.dprob");
      for (Index t = 0; t < dprob.rows; ++t) {
        for (Index e = 0; e < dprob.cols; ++e) d_tape.prob(t, e) += dprob(t, e);
      }
    }
    const MatView<const T> dgate = c_.matrix("in.dgate");
    for (Index t = 0; t < routing.tokens; ++t) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        d_tape.gate(0, s) += dgate(t, routing.expert[s]);
      }
    }
  }

  void backward() {
    router_.backward(params_, buffers_, tape, tokens_, overrides_, {}, routing, d_tape, {}, dx,
                     grad, {}, c_.context());
  }

  /// Of x and a linear head, or of given logits.
  void expect_gradients(const LinearParams<T>& head) {
    if (!c_.has("in.x")) return c_.expect("grad.in.logits", dx);
    c_.expect("grad.in.x", dx);
    expect_head_gradient(c_, head);
  }

 private:
  Case<T>& c_;
  Router router_;
  Params params_;
  typename Router::Buffers buffers_;
  mole::Tokens<T> tokens_;
  mole::Overrides<T> overrides_;
  typename Router::Prepared prepared_;
  mole::RoutingTable<T> table_;

 public:
  typename Router::Tape tape, d_tape;
  MatView<T> dx;
  Gradient grad;
  mole::Routing<T> routing;
};

/// The whole case of a router with a linear head and nothing beside its gates.
template <class T, class Router>
void run_router(Case<T>& c, const Router& router, const typename Router::Buffers& buffers = {},
                const mole::Overrides<T>& overrides = {}) {
  RouterRun<Router> run(c, router, router_weights(c, router.experts()), buffers,
                        {.x = router_input(c)}, overrides);
  run.expect_decision();
  run.add_gate_gradient();
  run.backward();
  run.expect_gradients(run.grad);
}

}  // namespace golden

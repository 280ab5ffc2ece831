// SPDX-License-Identifier: Apache-2.0
// A router with LoRA experts on a linear map with a frozen weight, on one golden case.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/layers/adapted_linear.hpp"

namespace golden {

/// Factor of the experts' output.
template <class T>
double scale_of(Case<T>& c, Index rank) {
  if (c.config().at("scaling").is_number()) return c.template config<double>("scaling");
  const auto how = c.template config<std::string>("scaling");
  const auto alpha = c.template config<double>("alpha");
  if (how == "alpha/r") return alpha / static_cast<double>(rank);
  if (how == "alpha/sqrt(r)") return alpha / std::sqrt(static_cast<double>(rank));
  if (how == "alpha/r_total") return alpha / c.template config<double>("r_total");
  throw std::invalid_argument("unknown scaling " + how);
}

/// Experts of two tensors A [experts, rank, in] and B [experts, out, rank], or one expert of
/// A [rank, in] and B [out, rank].
template <class T>
class Experts {
 public:
  Experts(Case<T>& c, const std::string& prefix)
      : c_(c), prefix_(prefix), a_(c.matrix(prefix + "A")), b_(c.matrix(prefix + "B")) {
    const bool is_one = c.shape(prefix + "A").size() == 2;
    const Index count = is_one ? 1 : c.extent(prefix + "A", 0), rank = b_.cols;
    config.in = a_.cols;
    config.out = c.extent(prefix + "B", is_one ? 0 : 1);
    config.rank.assign(static_cast<std::size_t>(count), rank);
    const double scale = scale_of(c, rank);
    config.scale.assign(static_cast<std::size_t>(count), static_cast<T>(scale));
    da_ = zeros(c, a_.rows, a_.cols);
    db_ = zeros(c, b_.rows, b_.cols);
    for (Index e = 0; e < count; ++e) {
      down_.push_back(a_.row_block(e * rank, rank).data);
      up_.push_back(b_.row_block(e * config.out, config.out).data);
      d_down_.push_back(da_.row_block(e * rank, rank).data);
      d_up_.push_back(db_.row_block(e * config.out, config.out).data);
    }
  }

  mole::LoraBankParams<const T> weights() const {
    return {config.in, config.out, config.rank, down_, up_, {}};
  }
  mole::LoraBankParams<T> gradient() const {
    return {config.in, config.out, config.rank, d_down_, d_up_, {}};
  }
  void expect_gradient() {
    c_.expect("grad." + prefix_ + "A", da_);
    c_.expect("grad." + prefix_ + "B", db_);
  }

  typename mole::LoraBank<T>::Config config;

 private:
  Case<T>& c_;
  std::string prefix_;
  MatView<const T> a_, b_;
  MatView<T> da_, db_;
  std::vector<const T*> down_, up_;
  std::vector<T*> d_down_, d_up_;
};

/// One layer on one case; the router's own answers and losses come in between.
template <class Router>
class LayerRun {
 public:
  using T = typename Router::Scalar;
  using Mixture = mole::Mixture<Router, mole::LoraBank<T>>;
  using Layer = mole::AdaptedLinear<Mixture>;

  LayerRun(Case<T>& c, const Router& router,
           const typename Router::template Params<const T>& params,
           const typename Router::Buffers& buffers = {}, const mole::Tokens<T>& tokens = {},
           bool has_decision = true)
      : c_(c),
        experts_(c, "param."),
        layer_(Mixture(router, mole::LoraBank<T>(experts_.config))),
        buffers_(buffers),
        input_(c.matrix("in.x")) {
    input_.sequence_begin = tokens.sequence_begin;
    input_.ids = tokens.ids;
    input_.mask = tokens.mask;
    weights_.weight = c.matrix("param.weight");
    if (c.has("param.bias")) weights_.bias = c.matrix("param.bias");
    weights_.mixture = {params, experts_.weights()};
    const Index count = input_.x.rows;
    tape = layer_.make_tape(c.memory(), count);
    d_tape = layer_.router().make_tape(c.memory(), count);
    mole::params::zero(d_tape);
    y = zeros(c, count, layer_.output_width());
    dx = zeros(c, count, input_.x.cols);
    std::fill_n(y.data, y.size(), std::numeric_limits<T>::quiet_NaN());
    const auto prepared = layer_.prepare(weights_, c.memory());
    layer_.forward(prepared, buffers_, input_, {}, y, {}, &tape, c.context());
    routing = tape.routing.view();
    grad.mixture.router = router.make_params(c.memory());
    mole::params::zero(grad.mixture.router);
    grad.mixture.experts = experts_.gradient();
    if (has_decision) expect_decision();
  }

  /// The gate is dense in the case.
  void expect_decision() {
    const MatView<T> gate = zeros(c_, routing.tokens, routing.experts);
    const MatView<T> mask = zeros(c_, routing.tokens, routing.experts);
    for (Index t = 0; t < routing.tokens; ++t) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        gate(t, routing.expert[s]) = routing.gate[s];
        mask(t, routing.expert[s]) = T(1);
      }
    }
    c_.expect("out.gate", gate);
    if (c_.has("out.mask")) c_.expect("out.mask", mask);
    if (c_.has("out.logits")) c_.expect("out.logits", tape.router.logits);
    if (c_.has("out.prob")) c_.expect("out.prob", tape.router.prob);
  }

  void finish(const LinearParams<T>& head) {
    finish();
    expect_head_gradient(c_, head);
  }
  /// Of a router without a linear head.
  void finish() {
    c_.expect("out.y", y);
    layer_.backward(weights_, buffers_, tape, input_, {}, c_.matrix("in.dy"), d_tape, {}, {.x = dx},
                    grad, {}, c_.context());
    c_.expect("grad.in.x", dx);
    experts_.expect_gradient();
  }

 private:
  Case<T>& c_;
  Experts<T> experts_;
  Layer layer_;
  typename Router::Buffers buffers_;
  mole::LayerInput<T> input_;
  typename Layer::Weights weights_{};

 public:
  typename Layer::Tape tape;
  typename Layer::RouterTape d_tape;
  typename Layer::template Params<T> grad{};
  MatView<T> y, dx;
  mole::Routing<T> routing;
};

/// Router and experts alone: y is what the mixture adds to zeros.
template <class Router, class Bank = mole::LoraBank<typename Router::Scalar>>
class MixtureRun {
 public:
  using T = typename Router::Scalar;
  using Mixture = mole::Mixture<Router, Bank>;

  MixtureRun(Case<T>& c, const Mixture& layer, const typename Mixture::Weights& weights,
             const typename Bank::template Params<T>& experts_gradient,
             const mole::LayerInput<T>& input, const typename Router::Buffers& buffers = {})
      : c_(c), layer_(layer), weights_(weights), input_(input), buffers_(buffers) {
    const Index count = input.x.rows;
    tape = layer_.make_tape(c.memory(), count);
    d_tape = layer_.router().make_tape(c.memory(), count);
    mole::params::zero(d_tape);
    y = zeros(c, count, layer_.output_width());
    dx = zeros(c, count, input.x.cols);
    if (input.router_x.data != nullptr) {
      d_router_x = zeros(c, input.router_x.rows, input.router_x.cols);
    }
    grad.router = layer_.router().make_params(c.memory());
    mole::params::zero(grad.router);
    grad.experts = experts_gradient;
    const auto prepared = layer_.prepare(weights_, c.memory());
    layer_.forward(prepared, buffers_, input_, {}, y, {}, &tape, c.context());
    routing = tape.routing.view();
    gate = zeros(c, count, routing.experts);
    for (Index t = 0; t < count; ++t) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        gate(t, routing.expert[s]) = routing.gate[s];
      }
    }
  }

  void backward() {
    layer_.backward(weights_, buffers_, tape, input_, {}, c_.matrix("in.dy"), d_tape, {},
                    {.x = dx, .router_x = d_router_x}, grad, {}, c_.context());
  }

 private:
  Case<T>& c_;
  Mixture layer_;
  typename Mixture::Weights weights_;
  mole::LayerInput<T> input_;
  typename Router::Buffers buffers_;

 public:
  typename Mixture::Tape tape;
  typename Router::Tape d_tape;
  typename Mixture::template Params<T> grad{};
  MatView<T> y, dx, d_router_x, gate;
  mole::Routing<T> routing;
};

template <class T>
Index width(Case<T>& c) {
  return c.extent("in.x", 1);
}

template <class T>
Index experts(Case<T>& c) {
  return c.extent("param.A", 0);
}

template <class T>
T number(Case<T>& c, const char* key) {
  return c.template config<T>(key);
}

template <class T>
LinearParams<const T> head(Case<T>& c) {
  return router_weights(c, experts(c));
}

}  // namespace golden

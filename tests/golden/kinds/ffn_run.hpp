// SPDX-License-Identifier: Apache-2.0
// Feed-forward experts of a golden case: their tensors, and one mixture of them from x to grad.x.
#pragma once

#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/experts/ffn_bank.hpp"
#include "mole/layers/mixture.hpp"

namespace golden {

/// Names of the tensors of one matrix; those that the case lacks are not there.
struct ProjectionNames {
  std::string weight, bias, down, up;
};

/// One matrix of every expert, and its gradients.
template <class T>
class Projection {
 public:
  Projection() = default;
  Projection(Case<T>& c, const ProjectionNames& names, mole::ExpertBase base, Index experts,
             T scale = T(1))
      : base_(base) {
    const std::string& weight = names.weight;
    const std::size_t axis = c.shape(weight).size() - 2;
    out_ = c.extent(weight, axis);
    in_ = c.extent(weight, axis + 1);
    const Index tensors = base == mole::ExpertBase::shared ? 1 : experts;
    load(c, weight, tensors, weight_, d_weight_);
    load(c, names.bias, tensors, bias_, d_bias_);
    if (!c.has(names.down)) return;
    load(c, names.down, experts, down_, d_down_);
    load(c, names.up, experts, up_, d_up_);
    const auto count = static_cast<std::size_t>(experts);
    adapters = {std::vector<Index>(count, c.shape(names.up).back()), std::vector<T>(count, scale)};
  }

  Index in() const { return in_; }
  Index out() const { return out_; }
  bool has_bias() const { return !bias_.empty(); }

  mole::LinearBankParams<const T> weights() const {
    mole::LoraBankParams<const T> adapter;
    if (!down_.empty()) adapter = {in_, out_, adapters.rank, down_, up_, {}};
    return {in_, out_, base_, weight_, bias_, 0, adapter};
  }
  /// Of a frozen base, that of the adapters alone.
  mole::LinearBankParams<T> gradient() const {
    mole::LoraBankParams<T> adapter;
    if (!d_down_.empty()) adapter = {in_, out_, adapters.rank, d_down_, d_up_, {}};
    return {in_, out_, base_, d_weight_, d_bias_, 0, adapter};
  }
  void expect_gradient(Case<T>& c) const {
    for (const auto& [name, gradient] : expected_) c.expect("grad." + name, gradient);
  }

  typename mole::FfnBank<T>::Adapters adapters;

 private:
  void load(Case<T>& c, const std::string& name, Index tensors, std::vector<const T*>& values,
            std::vector<T*>& gradients) {
    if (!c.has(name)) return;
    const MatView<const T> all = c.matrix(name);
    const Index size = all.size() / tensors;
    for (Index i = 0; i < tensors; ++i) values.push_back(all.data + i * size);
    if (!c.has("grad." + name)) return;
    expected_.emplace_back(name, zeros(c, all.rows, all.cols));
    for (Index i = 0; i < tensors; ++i) {
      gradients.push_back(expected_.back().second.data + i * size);
    }
  }

  mole::ExpertBase base_ = mole::ExpertBase::shared;
  Index in_ = 0, out_ = 0;
  std::vector<const T*> weight_, bias_, down_, up_;
  std::vector<T*> d_weight_, d_bias_, d_down_, d_up_;
  std::vector<std::pair<std::string, MatView<T>>> expected_;
};

/// The matrices of a block. Without a name for its weight, `gate` is not there.
template <class T>
class FfnExperts {
 public:
  FfnExperts(Case<T>& c, mole::FfnForm form, mole::ExpertBase base, Index experts,
             const ProjectionNames& gate, const ProjectionNames& up, const ProjectionNames& down,
             T scale = T(1))
      : up_(c, up, base, experts, scale), down_(c, down, base, experts, scale) {
    if (form == mole::FfnForm::gated) gate_ = Projection<T>(c, gate, base, experts, scale);
    config.in = up_.in();
    config.inner = down_.in();
    config.out = down_.out();
    config.experts = experts;
    config.form = form;
    config.activation = activation_of(c);
    config.base = base;
    config.inner_bias = up_.has_bias();
    config.outer_bias = down_.has_bias();
    config.gate = gate_.adapters;
    config.up = up_.adapters;
    config.down = down_.adapters;
  }

  static mole::Activation activation_of(Case<T>& c) {
    const auto name = c.template config<std::string>("activation");
    const auto names = enum_names(mole::Activation{});
    const auto found = std::find(names.begin(), names.end(), name);
    c.check(found != names.end(), "unknown activation " + name);
    return static_cast<mole::Activation>(found - names.begin());
  }

  mole::FfnBankParams<const T> weights() const {
    return {gate_.weights(), up_.weights(), down_.weights()};
  }
  mole::FfnBankParams<T> gradient() const {
    return {gate_.gradient(), up_.gradient(), down_.gradient()};
  }
  void expect_gradient(Case<T>& c) const {
    for (const Projection<T>* p : {&gate_, &up_, &down_}) p->expect_gradient(c);
  }

  typename mole::FfnBank<T>::Config config;

 private:
  Projection<T> gate_, up_, down_;
};

/// What is called "param.<prefix>gate" and so on.
template <class T>
FfnExperts<T> gated_experts(Case<T>& c, const std::string& prefix, mole::ExpertBase base,
                            Index experts, T scale = T(1)) {
  const auto names = [&](const std::string& projection) {
    const std::string name = "param." + prefix + projection;
    return ProjectionNames{name, {}, name + "_A", name + "_B"};
  };
  return FfnExperts<T>(c, mole::FfnForm::gated, base, experts, names("gate"), names("up"),
                       names("down"), scale);
}

/// One mixture of feed-forward experts on one case. It adds into y and dx; losses of the router
/// come between.
template <class Layer>
class FfnRun {
 public:
  using T = typename Layer::Scalar;

  FfnRun(Case<T>& c, const Layer& layer, const typename Layer::Weights& weights,
         const typename Layer::template Params<T>& gradient, const mole::LayerInput<T>& input,
         MatView<T> y, const typename Layer::Buffers& buffers = {})
      : c_(c),
        layer_(layer),
        weights_(weights),
        input_(input),
        buffers_(buffers),
        grad(gradient),
        tape(layer.make_tape(c.memory(), input.x.rows)),
        d_tape(layer.router().make_tape(c.memory(), input.x.rows)) {
    mole::params::zero(d_tape);
    mole::params::zero(grad.router);
    const auto prepared = layer.prepare(weights, c.memory());
    const MatView<T> inferred = zeros(c, y.rows, y.cols);
    for (Index t = 0; t < y.rows; ++t) std::ranges::copy(y.row(t), inferred.row(t).begin());
    layer.forward(prepared, buffers, input, {}, inferred, {}, nullptr, c.context());
    layer.forward(prepared, buffers, input, {}, y, {}, &tape, c.context());
    c.check_same_bits(std::span(y.data, y.size()), std::span(inferred.data, inferred.size()),
                      "forward with a tape and without differ");
    routing = tape.routing.view();
  }

  /// Gates (dense in the case) and logits.
  void expect_gates() {
    if (c_.has("out.gate")) c_.expect("out.gate", dense(false));
    if (c_.has("out.logits")) c_.expect("out.logits", tape.router.logits);
  }
  void expect_decision() {
    expect_gates();
    if (c_.has("out.mask")) c_.expect("out.mask", dense(true));
  }

  void backward(const mole::LayerInputGradient<T>& d_input) {
    layer_.backward(weights_, buffers_, tape, input_, {}, c_.matrix("in.dy"), d_tape, {}, d_input,
                    grad, {}, c_.context());
  }

 private:
  MatView<T> dense(bool mask) const {
    const MatView<T> out = zeros(c_, routing.tokens, routing.experts);
    for (Index t = 0; t < routing.tokens; ++t) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        out(t, routing.expert[s]) = mask ? T(1) : routing.gate[s];
      }
    }
    return out;
  }

  Case<T>& c_;
  const Layer& layer_;
  typename Layer::Weights weights_;
  mole::LayerInput<T> input_;
  typename Layer::Buffers buffers_;

 public:
  typename Layer::template Params<T> grad;
  typename Layer::Tape tape;
  typename Layer::RouterTape d_tape;
  mole::Routing<T> routing;
};

template <class Router>
using FfnMixture = mole::Mixture<Router, mole::FfnBank<typename Router::Scalar>>;

}  // namespace golden

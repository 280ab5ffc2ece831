// SPDX-License-Identifier: Apache-2.0
// The hierarchy of multi-gate experts.
#include "mole/layers/home.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"

namespace {

using golden::Case;
using mole::Index;
using mole::MatView;

mole::HomeNorm norm_of(const std::string& name) {
  const auto names = mole::enum_names(mole::HomeNorm{});
  return static_cast<mole::HomeNorm>(std::ranges::find(names, name) - names.begin());
}

/// [tokens, tasks · experts] as [tasks · tokens, experts].
template <class T>
MatView<T> by_task(Case<T>& c, MatView<const T> gate, Index tokens, Index tasks) {
  const Index experts = gate.cols / tasks;
  const MatView<T> turned = golden::zeros(c, tasks * tokens, experts);
  for (Index n = 0; n < tasks; ++n) {
    for (Index t = 0; t < tokens; ++t) {
      std::copy_n(gate.row(t).begin() + n * experts, experts, turned.row(n * tokens + t).begin());
    }
  }
  return turned;
}

template <class T>
void home(Case<T>& c) {
  using Layer = mole::Home<T>;
  const MatView<const T> x = c.matrix("in.x");
  const bool low = c.template config<std::string>("expert") == "lora";
  typename Layer::Config config;
  config.width = x.cols;
  config.out = c.extent("in.dy", 2);
  config.experts = c.template config<Index>("num_experts");
  config.tasks = c.template config<Index>("num_tasks");
  config.visible = c.mask("in.visible");
  config.own = c.mask("in.own");
  config.rank = low ? c.extent("param.A", 1) : 0;
  config.scale = c.template config<T>("scaling");
  config.norm = norm_of(c.template config<std::string>("norm"));
  config.norm_epsilon = c.template config<T>("norm_eps");
  config.momentum = c.template config<T>("norm_momentum");
  config.training = c.template config<bool>("training");
  config.activation = c.template config<std::string>("activation") == "relu"
                          ? mole::Activation::relu
                          : mole::Activation::silu;
  config.groups = c.template config<Index>("feature_gates");
  if (config.groups > 0) {
    config.feature_rank = c.extent("param.feature.A", 1);
    config.group_of = c.template copy<Index>("in.gate_of_expert");
  }
  const Layer layer(config);
  mole::HomeParams<const T> params;
  const mole::HomeParams<T> grad = layer.make_params(c.memory());
  mole::params::zero(grad);
  std::vector<std::pair<std::string, MatView<T>>> wanted;
  const auto tensor = [&](const char* name, MatView<const T>& to, MatView<T> gradient) {
    if (!c.has("param." + std::string(name))) return;
    to = c.matrix("param." + std::string(name));
    wanted.emplace_back("grad.param." + std::string(name), gradient);
  };
  tensor("gate.weight", params.gate, grad.gate);
  tensor("self.weight", params.self, grad.self);
  tensor("expert.weight", params.weight, grad.weight);
  tensor("expert.bias", params.bias, grad.bias);
  tensor("A", params.down, grad.down);
  tensor("B", params.up, grad.up);
  tensor("norm.weight", params.norm, grad.norm);
  tensor("norm.bias", params.shift, grad.shift);
  tensor("feature.A", params.feature_down, grad.feature_down);
  tensor("feature.B", params.feature_up, grad.feature_up);

  typename Layer::Buffers buffers;
  if (c.has("state.running_mean")) {
    buffers = {c.matrix("state.running_mean"), c.matrix("state.running_var")};
  }
  auto tape = layer.make_tape(c.memory(), x.rows);
  const MatView<T> y = golden::zeros(c, config.tasks * x.rows, config.out);
  const MatView<T> dx = golden::zeros(c, x.rows, x.cols);
  layer.forward(layer.prepare(params, c.memory()), buffers, x, y, tape, c.context());
  c.expect("out.y", y);
  c.expect("out.gate", by_task<T>(c, tape.gate, x.rows, config.tasks));
  c.expect("out.self_gate", by_task<T>(c, tape.self, x.rows, config.tasks));
  const MatView<T> experts = golden::zeros(c, x.rows * config.experts, config.out);
  for (Index t = 0; t < x.rows; ++t) {
    for (Index e = 0; e < config.experts; ++e) {
      std::ranges::copy(layer.expert(tape, e).row(t), experts.row(t * config.experts + e).begin());
    }
  }
  c.expect("out.expert", experts);
  if (c.has("out.state.running_mean")) {
    const MatView<T> mean = golden::zeros(c, config.experts, config.out);
    const MatView<T> variance = golden::zeros(c, config.experts, config.out);
    mole::rows::copy(buffers.mean, mean);
    mole::rows::copy(buffers.variance, variance);
    layer.update(tape, mean, variance);
    c.expect("out.state.running_mean", mean);
    c.expect("out.state.running_var", variance);
  }
  layer.backward(params, buffers, tape, x, c.matrix("in.dy"), dx, grad, c.context());
  c.expect("grad.in.x", dx);
  for (const auto& [name, value] : wanted) c.expect(name, value);
}
GOLDEN_KIND("layer.home", home);

}  // namespace

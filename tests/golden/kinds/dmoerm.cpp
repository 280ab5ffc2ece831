// SPDX-License-Identifier: Apache-2.0
// The inner mixtures of DMoERM.
#include "mole/layers/dmoerm.hpp"

#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"

namespace {

using golden::Case;
using mole::Index;
using mole::MatView;

template <class T>
void dmoerm(Case<T>& c) {
  using Layer = mole::Dmoerm<T>;
  const MatView<const T> x = c.matrix("in.x");
  const Index phase = c.template config<Index>("phase");
  c.check(phase >= 1 && phase <= 3, "unknown phase " + std::to_string(phase));
  const Layer layer({.width = x.cols,
                     .categories = c.template config<Index>("categories"),
                     .adapters = c.template config<Index>("adapters"),
                     .rank = c.template config<Index>("rank"),
                     .scale = c.template config<T>("scaling"),
                     .phase = phase == 1   ? mole::DmoermPhase::base
                              : phase == 2 ? mole::DmoermPhase::adapter
                                           : mole::DmoermPhase::mixture,
                     .adapter = c.template config<Index>("adapter")});
  mole::DmoermParams<const T> params;
  const mole::DmoermParams<T> grad = layer.make_params(c.memory());
  mole::params::zero(grad);
  std::vector<std::pair<std::string, MatView<T>>> wanted;
  const auto tensor = [&](const char* name, MatView<const T>& to, MatView<T> gradient) {
    if (!c.has("param." + std::string(name))) return;
    to = c.matrix("param." + std::string(name));
    to = {to.data, gradient.rows, gradient.cols};  // the same elements
    wanted.emplace_back("grad.param." + std::string(name), gradient);
  };
  tensor("weight", params.weight, grad.weight);
  tensor("A", params.down, grad.down);
  tensor("B", params.up, grad.up);
  tensor("head.weight", params.head.weight, grad.head.weight);
  tensor("head.bias", params.head.bias, grad.head.bias);
  tensor("w1", params.inner, grad.inner);
  tensor("b1", params.inner_bias, grad.inner_bias);
  tensor("prelu", params.slope, grad.slope);
  tensor("w2", params.outer.weight, grad.outer.weight);
  tensor("b2", params.outer.bias, grad.outer.bias);

  const Index count = c.extent("in.x", 0);
  const auto begin = golden::equal_sequences(x.rows, count);
  const auto category = c.ints("in.category");
  std::vector<std::uint8_t> mask;
  if (c.has("in.mask")) mask = c.mask("in.mask");
  const mole::Tokens<T> tokens{.x = x, .sequence_begin = begin, .mask = mask};
  auto tape = layer.make_tape(c.memory(), count);
  const MatView<T> y = golden::zeros(c, count, 1), dx = golden::zeros(c, x.rows, x.cols);
  layer.forward(layer.prepare(params, c.memory()), tokens, category, y, tape, c.context());
  c.expect("out.y", y);
  layer.backward(params, tape, tokens, {c.values("in.dy").data(), count, 1}, dx, grad, c.context());
  c.expect("grad.in.x", dx);
  for (const auto& [name, value] : wanted) c.expect(name, value);
}
GOLDEN_KIND("layer.dmoerm", dmoerm);

}  // namespace

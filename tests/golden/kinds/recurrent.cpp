// SPDX-License-Identifier: Apache-2.0
// The recurrent router over depth and its cell.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/routers/gru.hpp"

namespace {

using golden::Case;
using mole::CellParams;
using mole::Index;
using mole::MatView;

template <class T>
mole::CellKind cell_kind(Case<T>& c) {
  return c.template config<std::string>("cell") == "rnn" ? mole::CellKind::rnn
                                                         : mole::CellKind::gru;
}

std::vector<std::string> blocks(mole::CellKind kind) {
  return kind == mole::CellKind::rnn ? std::vector<std::string>{"n"}
                                     : std::vector<std::string>{"r", "z", "n"};
}

/// The tensors of a cell, stacked: either they are so in the case, or one tensor a block.
template <class T>
class CellTensors {
 public:
  CellTensors(Case<T>& c, mole::CellKind kind) : c_(c), kind_(kind) {
    stacked_ = c.has("param.weight_ih");
    params = {gather("param.weight_i"), gather("param.weight_h"), {}, {}};
    has_bias = c.has(stacked_ ? "param.bias_ih" : "param.bias_in");
    if (!has_bias) return;
    params.input_bias = gather("param.bias_i");
    params.hidden_bias = gather("param.bias_h");
  }

  void expect_gradient(const CellParams<T>& grad) {
    expect("grad.param.weight_i", grad.input_weight);
    expect("grad.param.weight_h", grad.hidden_weight);
    if (!has_bias) return;
    expect("grad.param.bias_i", grad.input_bias);
    expect("grad.param.bias_h", grad.hidden_bias);
  }

  CellParams<const T> params;
  bool has_bias = false;

 private:
  MatView<const T> gather(const std::string& name) {
    if (stacked_) return c_.matrix(name + "h");
    const auto names = blocks(kind_);
    const MatView<const T> first = c_.matrix(name + "n");
    const bool bias = name.find("bias") != std::string::npos;
    const auto count = static_cast<Index>(names.size());
    const MatView<T> all = bias ? golden::zeros(c_, 1, count * first.cols)
                                : golden::zeros(c_, count * first.rows, first.cols);
    for (Index b = 0; b < count; ++b) {
      const MatView<const T> part = c_.matrix(name + names[b]);
      std::copy_n(part.data, part.size(), all.data + b * part.size());
    }
    return all;
  }

  void expect(const std::string& name, MatView<T> all) {
    if (stacked_) return c_.expect(name + "h", all);
    const auto names = blocks(kind_);
    const std::size_t size = static_cast<std::size_t>(all.size()) / names.size();
    for (std::size_t b = 0; b < names.size(); ++b) {
      c_.expect(name + names[b], std::span<const T>(all.data + b * size, size));
    }
  }

  Case<T>& c_;
  mole::CellKind kind_;
  bool stacked_ = false;
};

template <class T>
void cell(Case<T>& c) {
  const MatView<const T> x = c.matrix("in.x");
  CellTensors<T> tensors(c, cell_kind(c));
  const mole::RecurrentCell<T> cell{x.cols, c.extent("in.dh", 1), cell_kind(c), tensors.has_bias};
  const MatView<const T> before = c.has("state.h") ? c.matrix("state.h") : MatView<const T>();
  const auto prepared = cell.prepare(tensors.params, c.memory());
  const auto tape = cell.take_tape(c.memory(), x.rows);
  cell.forward(prepared, x, before, tape, c.context());
  c.expect("out.state.h", tape.state);

  const CellParams<T> grad = cell.take_params(c.memory());
  mole::params::zero(grad);
  const MatView<T> dx = golden::zeros(c, x.rows, x.cols);
  const MatView<T> d_before =
      before.data != nullptr ? golden::zeros(c, before.rows, before.cols) : MatView<T>();
  cell.backward(tensors.params, tape, x, before, c.matrix("in.dh"), dx, d_before, grad,
                c.context());
  c.expect("grad.in.x", dx);
  if (before.data != nullptr) c.expect("grad.state.h", d_before);
  tensors.expect_gradient(grad);
}
GOLDEN_KIND("gru.cell", cell);

template <class T>
void rmoe(Case<T>& c) {
  const MatView<const T> x = c.matrix("in.x");
  CellTensors<T> tensors(c, cell_kind(c));
  const mole::GruRouter<T> router({.width = x.cols,
                                   .experts = c.extent("in.dgate", 1),
                                   .state = c.extent("in.dh", 1),
                                   .k = c.template config<Index>("top_k"),
                                   .cell = cell_kind(c),
                                   .cell_bias = tensors.has_bias});
  using Params = mole::GruParams<const T>;
  const Params params{c.matrix("param.weight1"), {c.matrix("param.weight2"), {}}, tensors.params};
  const Index count = x.rows, width = c.extent("in.dh", 1);
  const MatView<T> state = golden::zeros(c, count, width), d_out = golden::zeros(c, count, width);
  const MatView<const T> before = c.has("state.h") ? c.matrix("state.h") : MatView<const T>();
  const MatView<T> d_before =
      before.data != nullptr ? golden::zeros(c, count, width) : MatView<T>();
  const auto prepared = router.prepare(params, c.memory());
  mole::RoutingTable<T> table(c.memory(), count, router.experts(), router.max_per_token());
  auto tape = router.make_tape(c.memory(), count), d_tape = router.make_tape(c.memory(), count);
  mole::params::zero(d_tape);
  router.forward(prepared, {}, {.x = x}, {}, {before}, table, {state}, &tape, c.context());
  const mole::Routing<T> routing = table.view();

  const MatView<T> gate = golden::zeros(c, count, router.experts());
  std::vector<std::int32_t> selected;
  for (Index t = 0; t < count; ++t) {
    std::vector<std::int32_t> chosen;
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      gate(t, routing.expert[s]) = routing.gate[s];
      d_tape.gate(0, s) = c.matrix("in.dgate")(t, routing.expert[s]);
      chosen.push_back(routing.expert[s]);
    }
    std::stable_sort(chosen.begin(), chosen.end(), [&](std::int32_t a, std::int32_t b) {
      return tape.logits(t, a) > tape.logits(t, b);
    });
    selected.insert(selected.end(), chosen.begin(), chosen.end());
    std::copy_n(c.matrix("in.dh").row(t).begin(), width, d_out.row(t).begin());
  }
  c.expect("out.logits", tape.logits);
  c.expect("out.gate", gate);
  c.expect("out.selected", selected);
  c.expect("out.state.h", state);

  mole::GruParams<T> grad = router.make_params(c.memory());
  grad.cell = router.make_cell(c.memory());
  mole::params::zero(grad);
  mole::params::zero(grad.cell);
  const MatView<T> dx = golden::zeros(c, count, x.cols);
  router.backward(params, {}, tape, {.x = x}, {}, {before}, routing, d_tape, {d_out}, dx, grad,
                  {d_before}, c.context());
  c.expect("grad.in.x", dx);
  c.expect("grad.param.weight1", grad.projection);
  c.expect("grad.param.weight2", grad.head.weight);
  if (before.data != nullptr) c.expect("grad.state.h", d_before);
  tensors.expect_gradient(grad.cell);
}
GOLDEN_KIND("router.rmoe", rmoe);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// The recurrent router over depth and its cell.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/cell_tensors.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/routers/gru.hpp"

namespace {

using golden::Case;
using golden::cell_kind;
using golden::CellTensors;
using mole::CellParams;
using mole::Index;
using mole::MatView;

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
                                   .cell_bias = tensors.has_bias,
                                   .renormalise = c.template config<bool>("renormalise")});
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

// SPDX-License-Identifier: Apache-2.0
// Layers and routers that need more than a token: its task, or noise.
#include <algorithm>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/layer_run.hpp"
#include "golden/kinds/noisy.hpp"
#include "mole/losses/supervised.hpp"
#include "mole/optim/adamw.hpp"
#include "mole/routers/mlp.hpp"
#include "mole/routers/task.hpp"

namespace {

using golden::Case;
using golden::RouterRun;
using mole::Index;
using mole::MatView;

template <class T>
mole::TaskRouter<T> task_router(Case<T>& c, Index width) {
  return mole::TaskRouter<T>({.width = width,
                              .experts = c.extent("param.router.weight", 0),
                              .tasks = c.extent("param.task_embedding", 0),
                              .task_width = c.extent("param.task_embedding", 1)});
}

template <class T>
mole::TaskParams<const T> task_params(Case<T>& c) {
  return {c.matrix("param.task_embedding"), {c.matrix("param.router.weight"), {}}};
}

template <class T>
void moelora_router(Case<T>& c) {
  using Router = mole::TaskRouter<T>;
  const std::vector<std::int32_t> ids = c.ints("in.task_ids");
  const MatView<T> x = golden::zeros(c, static_cast<Index>(ids.size()), 1);
  RouterRun<Router> run(c, task_router(c, 1), task_params(c), {}, {.x = x, .ids = ids});
  run.expect_decision();
  run.add_gate_gradient();
  run.backward();
  c.expect("grad.param.task_embedding", run.grad.embedding);
  c.expect("grad.param.router.weight", run.grad.router.weight);
}
GOLDEN_KIND("router.moelora", moelora_router);

/// The first row of every sequence.
template <class T>
MatView<T> first_of_sequences(MatView<T> rows, Index sequences) {
  const Index length = rows.rows / sequences;
  return {rows.data, sequences, rows.cols, length * rows.stride};
}

template <class T>
void moelora_layer(Case<T>& c) {
  const std::vector<std::int32_t> tasks = c.ints("in.task_ids");
  const auto sequences = static_cast<Index>(tasks.size());
  const Index length = c.extent("in.x", 0) / sequences;
  std::vector<std::int32_t> ids;
  for (const std::int32_t task : tasks)
    ids.insert(ids.end(), static_cast<std::size_t>(length), task);
  golden::LayerRun<mole::TaskRouter<T>> run(c, task_router(c, golden::width(c)), task_params(c), {},
                                            {.x = c.matrix("in.x"), .ids = ids}, false);
  const MatView<T> gate = golden::zeros(c, run.routing.tokens, run.routing.experts);
  std::copy(run.routing.gate.begin(), run.routing.gate.end(), gate.data);
  c.check(run.routing.slots() == gate.size(), "every token has every expert");
  c.expect("out.gate", first_of_sequences(gate, sequences));
  c.expect("out.logits", first_of_sequences(run.tape.router.logits, sequences));
  run.finish(run.grad.mixture.router.router);
  c.expect("grad.param.task_embedding", run.grad.mixture.router.embedding);
}
GOLDEN_KIND("layer.moelora", moelora_layer);

template <class T>
void noisy_layer(Case<T>& c) {
  const auto router = golden::noisy_router(c, golden::width(c), golden::experts(c));
  golden::LayerRun<mole::NoisyTopKRouter<T>> run(
      c, router, {golden::head(c), {c.matrix("param.noise.weight"), {}}}, golden::noisy_buffers(c),
      {}, false);
  golden::run_noisy_losses(c, router, run.routing, run.tape.router, run.d_tape);
  run.finish(run.grad.mixture.router.router);
  c.expect("grad.param.noise.weight", run.grad.mixture.router.side.weight);
}
GOLDEN_KIND("layer.noisy_top_k", noisy_layer);

template <class T>
mole::MlpRouter<T> drift_router(Case<T>& c) {
  return mole::MlpRouter<T>({.width = c.extent("in.x", 1),
                             .experts = c.template config<Index>("num_experts"),
                             .hidden = c.extent("param.w1", 0),
                             .hidden2 = c.extent("param.w2", 0),
                             .k = c.template config<Index>("top_k"),
                             .renormalise = false,
                             .temperature = c.template config<T>("temperature")});
}

template <class T>
mole::MlpHeadParams<const T> drift_params(Case<T>& c) {
  return {{c.matrix("param.w1"), c.matrix("param.b1")},
          {c.matrix("param.w2"), c.matrix("param.b2")},
          {c.matrix("param.w3"), c.matrix("param.b3")}};
}

template <class T>
void expect_drift_params(Case<T>& c, const std::string& prefix, const mole::MlpHeadParams<T>& p) {
  c.expect(prefix + "w1", p.hidden.weight);
  c.expect(prefix + "b1", p.hidden.bias);
  c.expect(prefix + "w2", p.hidden2.weight);
  c.expect(prefix + "b2", p.hidden2.bias);
  c.expect(prefix + "w3", p.output.weight);
  c.expect(prefix + "b3", p.output.bias);
}

template <class T>
void driftmoe(Case<T>& c) {
  using Router = mole::MlpRouter<T>;
  const Router router = drift_router(c);
  const Index k = router.max_per_token();
  RouterRun<Router> run(c, router, drift_params(c), {}, {.x = c.matrix("in.x")});
  c.expect("out.logits", run.tape.logits);
  c.expect("out.weights", run.tape.prob);
  const auto selected = golden::selected_by<T>(run.routing, run.tape.logits, k);
  std::vector<std::int32_t> chosen;
  for (Index t = 0; t < run.routing.tokens; ++t) {
    chosen.push_back(selected[static_cast<std::size_t>(t * k)]);
  }
  c.expect("out.selected", selected);
  c.expect("out.chosen", chosen);
  const std::vector<std::uint8_t> marks = c.mask("in.correct");
  const MatView<const std::uint8_t> correct(marks.data(), run.routing.tokens, router.experts());
  c.expect("out.loss", mole::correctness_loss<T>(1, run.tape.logits, correct, run.d_tape.logits));
  run.backward();
  c.expect("grad.in.x", run.dx);
  expect_drift_params(c, "grad.param.", run.grad);
}
GOLDEN_KIND("router.driftmoe", driftmoe);

/// A stream in batches: every row is answered before the router learns from its batch.
template <class T>
void driftmoe_stream(Case<T>& c) {
  using Router = mole::MlpRouter<T>;
  const Router router = drift_router(c);
  const auto params = router.make_params(c.memory()), first = router.make_params(c.memory()),
             second = router.make_params(c.memory());
  mole::params::copy(drift_params(c), params);
  mole::params::zero(first);
  mole::params::zero(second);
  const MatView<const T> x = c.matrix("in.x");
  const Index batch = c.template config<Index>("batch"), k = router.max_per_token();
  std::vector<std::uint8_t> correct(static_cast<std::size_t>(x.rows * router.experts()));
  std::vector<std::int32_t> trained, prediction;
  const std::vector<std::int32_t> label = c.ints("in.label");
  std::vector<double> losses;
  std::int64_t step = 0;
  for (Index begin = 0; begin < x.rows; begin += batch) {
    const Index count = std::min(batch, x.rows - begin);
    RouterRun<Router> run(c, router, params, {}, {.x = x.row_block(begin, count)});
    const auto selected = golden::selected_by<T>(run.routing, run.tape.logits, k);
    trained.insert(trained.end(), selected.begin(), selected.end());
    const MatView<std::uint8_t> marks(correct.data() + begin * router.experts(), count,
                                      router.experts());
    for (Index t = 0; t < count; ++t) {
      const MatView<const T> probs = c.slice("in.probs", begin + t);
      mole::mark_correct<T>(probs, label[begin + t], marks.row(t));
      const auto row = probs.row(selected[static_cast<std::size_t>(t * k)]);
      const auto best = std::max_element(row.begin(), row.end()) - row.begin();
      prediction.push_back(static_cast<std::int32_t>(best));
    }
    if (count < batch) break;
    losses.push_back(mole::correctness_loss<T>(1, run.tape.logits, marks, run.d_tape.logits));
    run.backward();
    mole::adamw_step(params, run.grad, first, second,
                     {.learning_rate = c.template config<double>("rate"),
                      .beta1 = c.template config<double>("beta1"),
                      .beta2 = c.template config<double>("beta2"),
                      .epsilon = c.template config<double>("eps"),
                      .weight_decay = 0},
                     ++step);
  }
  c.expect("out.correct", correct);
  c.expect("out.trained", trained);
  c.expect("out.prediction", prediction);
  c.expect("out.batch_loss", losses);
  expect_drift_params(c, "out.param.", params);
}
GOLDEN_KIND("procedure.driftmoe_joint", driftmoe_stream);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Mixtures of LoRA experts behind routers that select in unusual ways: by place in the order, at
// random, or all that are as good as the best.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/layer_run.hpp"
#include "mole/losses/importance.hpp"
#include "mole/routers/forced.hpp"
#include "mole/routers/near_best.hpp"
#include "mole/routers/rank.hpp"

namespace {

using golden::Case;
using golden::Experts;
using golden::MixtureRun;
using mole::Index;
using mole::MatView;

/// y, the gates and every gradient but that of the router.
template <class Run, class T>
void finish(Case<T>& c, Run& run, Experts<T>& experts) {
  c.expect("out.y", run.y);
  c.expect("out.gate", run.gate);
  run.backward();
  c.expect("grad.in.x", run.dx);
  experts.expect_gradient();
}

template <class T>
void random_experts(Case<T>& c) {
  using Router = mole::ForcedRouter<T>;
  Experts<T> experts(c, "param.");
  const std::vector<std::int32_t> given = c.ints("in.random");
  typename Router::Buffers buffers;
  buffers.experts = {given.data(), static_cast<Index>(given.size()), 1};
  MixtureRun<Router> run(c,
                         {Router({.width = golden::width(c), .experts = golden::experts(c)}),
                          mole::LoraBank<T>(experts.config)},
                         {{}, experts.weights()}, experts.gradient(), c.matrix("in.x"), buffers);
  c.expect("out.selected", run.routing.expert);
  finish(c, run, experts);
  c.expect("grad.param.router.weight", golden::zeros(c, run.routing.experts, golden::width(c)));
}

template <class T>
void scmoe(Case<T>& c) {
  if (c.template config<bool>("random")) return random_experts(c);
  using Router = mole::RankRouter<T>;
  Experts<T> experts(c, "param.");
  auto positions = c.template config<std::vector<Index>>("positions");
  const auto threshold = c.template config<T>("threshold");
  if (positions.empty()) positions = golden::ascending(golden::experts(c));
  const Router router({.width = golden::width(c),
                       .experts = golden::experts(c),
                       .positions = positions,
                       .renormalise = threshold >= T(0) || c.template config<bool>("renormalise"),
                       .threshold = threshold});
  MixtureRun<Router> run(c, {router, mole::LoraBank<T>(experts.config)},
                         {golden::head(c), experts.weights()}, experts.gradient(),
                         c.matrix("in.x"));
  c.expect("out.selected", golden::selected_by<T>(run.routing, run.tape.router.logits,
                                                  c.shape("out.selected").back()));
  finish(c, run, experts);
  c.expect("grad.param.router.weight", run.grad.router.weight);
}
GOLDEN_KIND("router.scmoe", scmoe);

/// The gate of the case [contexts (+ 1), experts], turned to weight [experts, contexts] and bias.
template <class T>
class TurnedGate {
 public:
  explicit TurnedGate(Case<T>& c) : c_(c) {
    const MatView<const T> gate = c.matrix("param.gate");
    const bool bias = c.template config<bool>("use_bias");
    const Index width = gate.rows - (bias ? 1 : 0);
    const MatView<T> weight = golden::zeros(c, gate.cols, width);
    for (Index e = 0; e < gate.cols; ++e) {
      for (Index i = 0; i < width; ++i) weight(e, i) = gate(i, e);
    }
    params.weight = weight;
    if (bias) params.bias = gate.row_block(width, 1);
  }
  void expect_gradient(const mole::LinearParams<T>& grad) {
    const Index width = params.weight.cols, experts = params.weight.rows;
    const MatView<T> turned = golden::zeros(c_, c_.extent("param.gate", 0), experts);
    for (Index e = 0; e < experts; ++e) {
      for (Index i = 0; i < width; ++i) turned(i, e) = grad.weight(e, i);
      if (turned.rows > width) turned(width, e) = grad.bias(0, e);
    }
    c_.expect("grad.param.gate", turned);
  }

  mole::LinearParams<const T> params;

 private:
  Case<T>& c_;
};

template <class T>
mole::NearBestRouter<T> mixer_router(Case<T>& c, T margin) {
  return mole::NearBestRouter<T>({.width = c.extent("in.contexts", 1),
                                  .experts = c.template config<Index>("num_experts"),
                                  .margin = margin,
                                  .bias = c.template config<bool>("use_bias")});
}

/// The experts' own pieces of the context, as a second mixture on the same routing.
template <class T>
class Pieces {
 public:
  using Router = mole::NearBestRouter<T>;

  Pieces(Case<T>& c, Index experts)
      : c_(c),
        c_matrix_(c.matrix("param.C")),
        d_(golden::zeros(c, c_matrix_.rows, c_matrix_.cols)) {
    const Index piece = c_matrix_.cols, out = c_matrix_.rows / experts;
    config.in = c.extent("in.contexts", 1);
    config.out = out;
    config.rank.assign(static_cast<std::size_t>(experts), piece);
    config.scale.assign(static_cast<std::size_t>(experts), T(1));
    for (Index e = 0; e < experts; ++e) {
      const MatView<T> down = golden::zeros(c, piece, config.in);
      mole::fill_piece(down, e);
      down_.push_back(down.data);
      d_down_.push_back(golden::zeros(c, piece, config.in).data);
      up_.push_back(c_matrix_.row_block(e * out, out).data);
      d_up_.push_back(d_.row_block(e * out, out).data);
    }
  }
  mole::LoraBankParams<const T> weights() const {
    return {config.in, config.out, config.rank, down_, up_, {}};
  }
  mole::LoraBankParams<T> gradient() const {
    return {config.in, config.out, config.rank, d_down_, d_up_, {}};
  }
  void expect_gradient() { c_.expect("grad.param.C", d_); }

  typename mole::LoraBank<T>::Config config;

 private:
  Case<T>& c_;
  MatView<const T> c_matrix_;
  MatView<T> d_;
  std::vector<const T*> down_, up_;
  std::vector<T*> d_down_, d_up_;
};

template <class T>
void mixer(Case<T>& c) {
  using Router = mole::NearBestRouter<T>;
  TurnedGate<T> gate(c);
  Experts<T> experts(c, "param.");
  const Router router = mixer_router(c, c.template config<T>("tie_eps"));
  mole::LayerInput<T> input(c.matrix("in.x"));
  input.router_x = c.matrix("in.contexts");
  MixtureRun<Router> run(c, {router, mole::LoraBank<T>(experts.config)},
                         {gate.params, experts.weights()}, experts.gradient(), input);
  c.expect("out.probs", run.tape.router.prob);
  MatView<T> d_contexts = run.d_router_x;
  if (c.template config<bool>("split_context")) {
    Pieces<T> pieces(c, router.experts());
    MixtureRun<Router> more(c, {router, mole::LoraBank<T>(pieces.config)},
                            {gate.params, pieces.weights()}, pieces.gradient(),
                            c.matrix("in.contexts"));
    for (Index t = 0; t < run.y.rows; ++t) {
      for (Index i = 0; i < run.y.cols; ++i) run.y(t, i) += more.y(t, i);
    }
    more.backward();
    pieces.expect_gradient();
    d_contexts = more.dx;
  }
  finish(c, run, experts);
  c.expect("grad.in.contexts", d_contexts);
  gate.expect_gradient(run.grad.router);
}
GOLDEN_KIND("router.mixer", mixer);

template <class T>
void gate_cv2(Case<T>& c) {
  using Router = mole::NearBestRouter<T>;
  TurnedGate<T> gate(c);
  golden::RouterRun<Router> run(c, mixer_router(c, T(1e-6)), gate.params, {},
                                {.x = c.matrix("in.contexts")});
  const MatView<const T> prob = run.tape.prob;
  const mole::CvSquared how{1, 0, false};
  c.expect("out.loss", mole::importance_loss<T>(how, prob, run.d_tape.prob, c.context(), {}, true));
  run.backward();
  c.expect("grad.in.contexts", run.dx);
  gate.expect_gradient(run.grad);
}
GOLDEN_KIND("loss.mixer_gate_cv2", gate_cv2);

}  // namespace

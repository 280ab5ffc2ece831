// SPDX-License-Identifier: Apache-2.0
// Stacks of layers whose routers share one recurrent cell.
#include <algorithm>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/cell_tensors.hpp"
#include "golden/kinds/lora_experts.hpp"
#include "mole/experts/ffn_bank.hpp"
#include "mole/layers/rmoe.hpp"

namespace {

using golden::Case;
using mole::Index;
using mole::MatView;

/// Tensors of all layers with those of the dense layers left out, and back.
template <class T>
class RoutedLayers {
 public:
  explicit RoutedLayers(Case<T>& c) : c_(c), layers_(c.template config<Index>("layers")) {
    dense = c.template config<std::vector<Index>>("dense_layers");
    for (Index l = 0; l < layers_; ++l) {
      if (std::ranges::find(dense, l) == dense.end()) index.push_back(l);
    }
  }

  MatView<T> pick(const char* name) {
    const MatView<const T> all = c_.matrix(name);
    const Index each = all.rows / layers_;
    const MatView<T> picked = golden::zeros(c_, static_cast<Index>(index.size()) * each, all.cols);
    for (std::size_t r = 0; r < index.size(); ++r) {
      const auto from = all.row_block(index[r] * each, each);
      std::copy_n(from.data, from.size(), picked.row(static_cast<Index>(r) * each).data());
    }
    return picked;
  }
  /// Rows of dense layers are `fill`.
  void expect(const char* name, MatView<const T> picked, T fill = T(0)) {
    const Index each = picked.rows / static_cast<Index>(index.size());
    const MatView<T> all = golden::zeros(c_, layers_ * each, picked.cols);
    std::fill_n(all.data, all.size(), fill);
    for (std::size_t r = 0; r < index.size(); ++r) {
      for (Index i = 0; i < each; ++i) {
        std::ranges::copy(picked.row(static_cast<Index>(r) * each + i),
                          all.row(index[r] * each + i).begin());
      }
    }
    c_.expect(name, all);
  }

  std::vector<Index> dense, index;

 private:
  Case<T>& c_;
  Index layers_;
};

template <class T>
mole::Activation activation(Case<T>& c) {
  if (!c.config().contains("activation")) return mole::Activation::silu;
  return c.template config<std::string>("activation") == "gelu" ? mole::Activation::gelu
                                                                : mole::Activation::silu;
}

/// Decisions and states of all layers.
template <class Layer, class T>
void expect_decisions(Case<T>& c, const Layer& layer, const typename Layer::Tape& tape,
                      RoutedLayers<T>& routed) {
  const auto& routers = layer.routers();
  const Index tokens = tape.tokens, experts = routers.router().experts(),
              state = routers.config().state, count = routers.layers();
  const Index k = routers.config().k;
  const MatView<T> logits = golden::zeros(c, count * tokens, experts);
  const MatView<T> gate = golden::zeros(c, count * tokens, experts);
  const MatView<T> selected = golden::zeros(c, count * tokens, k);
  for (Index r = 0; r < count; ++r) {
    const auto& router = tape.routers.tapes[r];
    const mole::Routing<T> routing = tape.routers.tables[r].view();
    for (Index t = 0; t < tokens; ++t) {
      const Index row = r * tokens + t;
      std::ranges::copy(router.logits.row(t), logits.row(row).begin());
      std::vector<std::int32_t> chosen;
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        gate(row, routing.expert[s]) = routing.gate[s];
        chosen.push_back(routing.expert[s]);
      }
      std::ranges::stable_sort(chosen, [&](std::int32_t a, std::int32_t b) {
        return router.logits(t, a) > router.logits(t, b);
      });
      std::ranges::copy(chosen, selected.row(row).begin());
    }
  }
  routed.expect("out.logits", logits);
  routed.expect("out.gate", gate);
  routed.expect("out.selected", selected, T(-1));
  const Index layers = layer.config().layers;
  const MatView<T> h = golden::zeros(c, layers * tokens, state);
  const MatView<T> y = golden::zeros(c, layers * tokens, layer.width());
  for (Index l = 0, done = 0; l < layers; ++l) {
    done += !layer.is_dense(l);
    const MatView<const T> after = routers.state_after(tape.routers, done);
    const MatView<const T> output = tape.layer_output(l, layer.width());
    for (Index t = 0; t < tokens; ++t) {
      if (after.data != nullptr) std::ranges::copy(after.row(t), h.row(l * tokens + t).begin());
      std::ranges::copy(output.row(t), y.row(l * tokens + t).begin());
    }
  }
  c.expect("out.h", h);
  c.expect("out.layer_y", y);
  c.expect("out.state.h", h.row_block((layers - 1) * tokens, tokens));
}

/// `experts(r)` and `d_experts(r)`: the parameters of routed layer r.
template <class T, class B, class Experts>
void run(Case<T>& c, const B& bank, Experts& experts) {
  using Layer = mole::Rmoe<B>;
  RoutedLayers<T> routed(c);
  golden::CellTensors<T> cell(c, golden::cell_kind(c));
  const auto number = [&](const char* key) { return c.template config<T>(key); };
  const auto flag = [&](const char* key) { return c.template config<bool>(key); };
  const bool share = flag("share_expert");
  typename Layer::Config config;
  config.layers = c.template config<Index>("layers");
  config.state = c.template config<Index>("hidden_dim");
  config.k = c.template config<Index>("top_k");
  config.cell = golden::cell_kind(c);
  config.cell_bias = cell.has_bias;
  config.detach_state = flag("detach_state");
  config.renormalise = flag("renormalise");
  config.residual = flag("residual");
  config.rms_norm = c.template config<std::string>("norm") == "rms";
  config.norm_epsilon = number("rms_eps");
  config.share = share ? c.extent("param.share_gate", 1) : 0;
  config.moe_weight = number("moe_weight");
  config.share_weight = number("share_weight");
  config.activation = activation(c);
  config.out_bias = flag("out_bias");
  config.base = c.has("param.base");
  config.dense_layers = routed.dense;
  const Layer layer(bank, config);

  typename Layer::Weights weights;
  weights.router = {cell.params, routed.pick("param.weight1"), routed.pick("param.weight2"), {}};
  std::vector<typename B::Weights> of_layers;
  std::vector<typename B::template Params<T>> d_of_layers;
  for (const Index l : routed.index) {
    of_layers.push_back(experts.weights(l));
    d_of_layers.push_back(experts.gradient(l));
  }
  weights.experts = of_layers;
  auto grad = layer.make_params(c.memory());
  mole::params::zero(grad);
  grad.experts = d_of_layers;
  std::vector<std::pair<std::string, MatView<T>>> more;
  const auto tensor = [&](bool used, const char* name, auto member) {
    if (used) {
      weights.*member.first = c.matrix("param." + std::string(name));
      more.emplace_back("grad.param." + std::string(name), grad.*member.second);
    } else if (c.has("param." + std::string(name))) {
      const MatView<const T> unused = c.matrix("param." + std::string(name));
      more.emplace_back("grad.param." + std::string(name),
                        golden::zeros(c, unused.rows, unused.cols));
    }
  };
  using W = typename Layer::Weights;
  using G = typename Layer::template Params<T>;
  tensor(config.rms_norm, "norm", std::pair(&W::norm, &G::norm));
  tensor(config.base, "base", std::pair(&W::base, &G::base));
  tensor(config.out_bias, "bias", std::pair(&W::bias, &G::bias));
  tensor(share, "share_gate", std::pair(&W::share_gate, &G::share_gate));
  tensor(share, "share_up", std::pair(&W::share_up, &G::share_up));
  tensor(share, "share_down", std::pair(&W::share_down, &G::share_down));

  const MatView<const T> x = c.matrix("in.x");
  const MatView<const T> start = c.has("state.h") ? c.matrix("state.h") : MatView<const T>();
  const MatView<T> y = golden::zeros(c, x.rows, x.cols), dx = golden::zeros(c, x.rows, x.cols);
  auto tape = layer.make_tape(c.memory(), x.rows);
  auto d = layer.make_gradient(c.memory(), x.rows);
  layer.forward(layer.prepare(weights, c.memory()), x, start, y, tape, c.context());
  c.expect("out.y", y);
  expect_decisions(c, layer, tape, routed);

  layer.begin_backward(tape, c.matrix("in.dh"), d);
  const T aux = number("aux_coef");
  if (aux != T(0)) {
    c.expect("out.aux_loss", layer.routers().balance({}, tape.routers, nullptr, c.context()));
    layer.routers().balance({.weight = aux}, tape.routers, &d, c.context());
  }
  layer.backward(weights, tape, c.matrix("in.dy"), d, dx, grad, c.context());
  c.expect("grad.in.x", dx);
  if (start.data != nullptr) c.expect("grad.state.h", layer.routers().d_start(d));
  cell.expect_gradient(grad.router.cell);
  routed.expect("grad.param.weight1", grad.router.projection);
  routed.expect("grad.param.weight2", grad.router.head);
  for (const auto& [name, value] : more) c.expect(name, value);
  experts.expect_gradient();
}

/// The matrices of one kind of all experts of all layers, [layers, experts, out, in].
template <class T>
struct Matrices {
  Matrices(Case<T>& c, const char* tensor)
      : name(tensor),
        experts(c.extent(tensor, 1)),
        out(c.extent(tensor, 2)),
        all(c.matrix(tensor)),
        gradient(golden::zeros(c, all.rows, all.cols)) {
    for (Index i = 0; i < all.rows; i += out) {
      weights.push_back(all.row_block(i, out).data);
      gradients.push_back(gradient.row_block(i, out).data);
    }
  }
  template <class V>
  mole::LinearBankParams<V> of_layer(const std::vector<V*>& list, Index layer) const {
    return {all.cols, out, mole::ExpertBase::own,
            std::span<V* const>(list).subspan(static_cast<std::size_t>(layer * experts),
                                              static_cast<std::size_t>(experts))};
  }

  std::string name;
  Index experts, out;
  MatView<const T> all;
  MatView<T> gradient;
  std::vector<const T*> weights;
  std::vector<T*> gradients;
};

/// w2 (act(w1 u) ∘ w3 u)
template <class T>
struct GatedExperts {
  explicit GatedExperts(Case<T>& c)
      : c(c), gate(c, "param.w1"), up(c, "param.w3"), down(c, "param.w2") {}

  mole::FfnBank<T> bank() const {
    return mole::FfnBank<T>({.in = up.all.cols,
                             .inner = up.out,
                             .out = down.out,
                             .experts = up.experts,
                             .activation = activation(c),
                             .base = mole::ExpertBase::own});
  }
  mole::FfnBankParams<const T> weights(Index layer) const {
    return {gate.of_layer(gate.weights, layer), up.of_layer(up.weights, layer),
            down.of_layer(down.weights, layer)};
  }
  mole::FfnBankParams<T> gradient(Index layer) const {
    return {gate.of_layer(gate.gradients, layer), up.of_layer(up.gradients, layer),
            down.of_layer(down.gradients, layer)};
  }
  void expect_gradient() {
    for (const Matrices<T>* m : {&gate, &up, &down}) c.expect("grad." + m->name, m->gradient);
  }

  Case<T>& c;
  Matrices<T> gate, up, down;
};

template <class T>
void rmoe(Case<T>& c) {
  if (c.template config<std::string>("experts") == "swiglu") {
    GatedExperts<T> experts(c);
    return run(c, experts.bank(), experts);
  }
  golden::LoraExperts<T> experts(c);
  run(c, mole::LoraBank<T>(experts.config), experts);
}
GOLDEN_KIND("layer.rmoe", rmoe);
GOLDEN_KIND("layer.rmoe_chain", rmoe);

}  // namespace

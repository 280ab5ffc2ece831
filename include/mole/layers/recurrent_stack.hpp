// SPDX-License-Identifier: Apache-2.0
// RecurrentStack: the routers of a stack of layers that share one recurrent cell (RMoE). The host
// has its own layers and drives the stack beside them, layer by layer, forward and backward.
//
//   for l = 0, 1, ..., layers - 1        x_l: what the host's layer l routes by
//     h_l = cell(P_l x_l, h_(l-1))       g: GruRouter's, of the k largest of W_l h_l (+ b_l)
//
// Shapes: x_l [tokens, width], h [tokens, state], P_l [state, width], W_l [experts, state]. The
// matrices of all layers are stacked, layer l being a block of rows; the cell is there once, for
// saving, counting and optimisers. A layer of the host without experts is no layer of the stack:
// the state passes it unchanged.
//
//   auto pass = stack.make_pass(memory, tokens, true);
//   stack.begin(pass, tokens);
//   for (l ...) { routing = stack.route(l, prepared, {.x = x_l}, {}, pass, context); ... }
//   stack.begin_backward(pass, {}, d);
//   ... losses add into d.tapes[l] ...
//   for (l from the last ...) { ... experts add into d.tapes[l].gate ...
//     stack.route_backward(l, params, pass, {.x = x_l}, {}, d, dx_l, grad, context); }
//
// With `detach_state` a layer's logits give no gradient to earlier layers by way of the state.
//
// Qiu et al., "Layerwise Recurrent Router for Mixture-of-Experts", 2024; the released code never
// detaches.
#pragma once

#include <span>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/losses/balance.hpp"
#include "mole/routers/gru.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct RecurrentStackParams {
  CellParams<V> cell;     ///< of all layers
  MatView<V> projection;  ///< [layers · state, width]
  MatView<V> head;        ///< [layers · experts, state]
  MatView<V> bias = {};   ///< [layers, experts], or empty

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    visit_group<CellParams<V>>(Leaf{"cell"}, f, p.cell...);
    f(Leaf{"projection"}, p.projection...);
    f(Leaf{"head"}, p.head...);
    f(Leaf{"bias"}, p.bias...);
  }
  operator RecurrentStackParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {cell, projection, head, bias};
  }
};

template <class T>
class RecurrentStack {
 public:
  using Scalar = T;
  using Router = GruRouter<T>;
  template <class V>
  using Params = RecurrentStackParams<V>;

  struct Config {
    Index layers = 0, width = 0, experts = 0;
    Index state = 128;  ///< width of the cell
    Index k = 2;        ///< 1 ... experts
    CellKind cell = CellKind::gru;
    bool cell_bias = true;
    bool bias = false;  ///< the logits have a bias
    bool detach_state = false;
    bool renormalise = true;  ///< of the k gates

    static constexpr std::string_view kind() noexcept { return "recurrent_stack"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("layers"), c.layers...);
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("state"), c.state...);
      f(Field::required("k"), c.k...);
      f(Field{"cell"}, c.cell...);
      f(Field{"cell_bias"}, c.cell_bias...);
      f(Field{"bias"}, c.bias...);
      f(Field{"detach_state"}, c.detach_state...);
      f(Field{"renormalise"}, c.renormalise...);
    }
  };

  struct Prepared {
    std::span<typename Router::Prepared> layers;  ///< all look at one packed cell
  };

  /// One way through the layers. The views live until the next `begin`.
  struct Pass {
    std::span<typename Router::Tape> tapes;  ///< [layers], empty: inference
    std::span<RoutingTable<T>> tables;       ///< [layers]; inference has one for all
    MatView<T> states;                       ///< [layers or 2, max tokens · state]
    MatView<const T> start = {};             ///< h before the first layer, or empty
    Index tokens = 0, next = 0;              ///< next layer to route
  };

  /// The way back. `tapes` are the gradients that losses and experts add to, without the head's
  /// part.
  struct Gradient {
    std::span<typename Router::Tape> tapes;
    MatView<T> d_state;   ///< [max tokens, state], of the state after layer `next` - 1
    MatView<T> d_before;  ///< likewise, one layer earlier
    Index tokens = 0, next = 0;
  };

  /// Throws invalid_argument, naming the field.
  explicit RecurrentStack(const Config& config);

  const Config& config() const noexcept { return config_; }
  const Router& router() const noexcept { return router_; }
  Index layers() const noexcept { return config_.layers; }

  std::size_t params_bytes() const noexcept;
  /// Uninitialised parameters.
  Params<T> make_params(Workspace& memory) const { return take_params(memory); }
  std::size_t prepared_bytes() const noexcept;
  /// Throws shape_mismatch, naming the member.
  void check(const Params<const T>& params) const;
  /// The same for gradients, any of which may be absent.
  void check_gradient(const Params<T>& grad) const;
  /// A packed copy. Throws what `check` throws.
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept {
    return router_.scratch_bytes(max_tokens, workers) + balance_bytes();
  }

  std::size_t pass_bytes(Index max_tokens, bool training) const noexcept;
  Pass make_pass(Workspace& memory, Index max_tokens, bool training) const;
  std::size_t gradient_bytes(Index max_tokens) const noexcept;
  Gradient make_gradient(Workspace& memory, Index max_tokens) const;

  /// Before the first layer. `start` [tokens, state] is h, empty for zeros; it must live as long as
  /// the pass. Throws limit_exceeded or shape_mismatch.
  void begin(Pass& pass, Index tokens, MatView<const T> start = {}) const;

  /// The decision of one layer; layers come in order. In inference it is valid until the next
  /// layer. Throws state_error out of order, and what the router's forward throws.
  Routing<T> route(Index layer, const Prepared& prepared, const Tokens<T>& tokens,
                   const Overrides<T>& overrides, Pass& pass, const Context& context) const;

  /// h after the last layer routed; `start` before the first.
  MatView<const T> state(const Pass& pass) const noexcept { return state_after(pass, pass.next); }
  /// h after `count` layers of a pass with tapes.
  MatView<const T> state_after(const Pass& pass, Index count) const noexcept;

  /// Zeros all gradients of the tapes. `d_last` [tokens, state] is the gradient of the last state,
  /// or empty. Throws state_error unless the pass has tapes and is complete.
  void begin_backward(const Pass& pass, MatView<const T> d_last, Gradient& d) const;

  /// Layers from the last to the first. Adds into dx and grad; members of both may be empty. Throws
  /// state_error out of order, shape_mismatch or invalid_argument before it adds anything.
  void route_backward(Index layer, const Params<const T>& params, const Pass& pass,
                      const Tokens<T>& tokens, const Overrides<T>& overrides, Gradient& d,
                      MatView<T> dx, const Params<T>& grad, const Context& context) const;

  /// The gradient of the start state once every layer is back.
  MatView<const T> d_start(const Gradient& d) const noexcept {
    return d.d_state.row_block(0, d.tokens);
  }

  /// The balance loss of all layers' tokens pooled; with `d`, after begin_backward, its gradient.
  T balance(BalanceLoss<T> loss, const Pass& pass, const Gradient* d, const Context& context) const;

 private:
  std::size_t balance_bytes() const noexcept;
  template <class Arena>
  Params<T> take_params(Arena& arena) const;
  template <class V>
  GruParams<V> layer_params(const Params<V>& params, Index layer) const noexcept;
  template <class Arena>
  typename Router::Tape take_gradient(Arena& arena, Index max_tokens) const;
  MatView<T> state_rows(const Pass& pass, Index layer) const noexcept;

  Config config_;
  Router router_;
};

template <class T>
RecurrentStack<T>::RecurrentStack(const Config& config)
    : config_(config),
      router_({.width = config.width,
               .experts = config.experts,
               .state = config.state,
               .k = config.k,
               .cell = config.cell,
               .cell_bias = config.cell_bias,
               .bias = config.bias,
               .renormalise = config.renormalise}) {
  require_count("RecurrentStack", "layers", config.layers);
  require_count("RecurrentStack", "state", config.state);
}

template <class T>
template <class Arena>
auto RecurrentStack<T>::take_params(Arena& arena) const -> Params<T> {
  const Index layers = config_.layers;
  Params<T> params;
  params.cell = router_.head().cell.take_params(arena);
  params.projection =
      arena.template take<T>(saturating_product(layers, config_.state), config_.width);
  params.head = arena.template take<T>(saturating_product(layers, config_.experts), config_.state);
  if (config_.bias) params.bias = arena.template take<T>(layers, config_.experts);
  return params;
}

template <class T>
std::size_t RecurrentStack<T>::params_bytes() const noexcept {
  ByteCounter counter;
  take_params(counter);
  return counter.bytes();
}

template <class T>
template <class V>
GruParams<V> RecurrentStack<T>::layer_params(const Params<V>& params, Index layer) const noexcept {
  return {rows::block(params.projection, layer, config_.state),
          {rows::block(params.head, layer, config_.experts), rows::block(params.bias, layer, 1)},
          params.cell};
}

template <class T>
void RecurrentStack<T>::check(const Params<const T>& params) const {
  ByteCounter shapes;
  const Params<T> wanted = take_params(shapes);
  require_shape("projection", params.projection, wanted.projection.rows, wanted.projection.cols);
  require_shape("head", params.head, wanted.head.rows, wanted.head.cols);
  require_shape("bias", params.bias, wanted.bias.rows, wanted.bias.cols);
  router_.head().cell.check(params.cell);
}

template <class T>
void RecurrentStack<T>::check_gradient(const Params<T>& grad) const {
  ByteCounter shapes;
  const Params<T> wanted = take_params(shapes);
  const auto fits = [](const char* name, MatView<T> view, MatView<T> like) {
    if (view.data != nullptr) require_shape(name, view, like.rows, like.cols);
  };
  fits("grad.projection", grad.projection, wanted.projection);
  fits("grad.head", grad.head, wanted.head);
  fits("grad.bias", grad.bias, wanted.bias);
  router_.head().cell.check_gradient(grad.cell);
}

template <class T>
std::size_t RecurrentStack<T>::prepared_bytes() const noexcept {
  ByteCounter counter;
  counter.take<typename Router::Prepared>(config_.layers);
  const std::size_t cell = router_.head().cell.prepared_bytes();
  const std::size_t own = router_.prepared_bytes() - cell;
  counter.take<std::byte>(config_.layers, static_cast<Index>(own));
  return counter.bytes() + cell;
}

template <class T>
auto RecurrentStack<T>::prepare(const Params<const T>& params, Workspace& memory) const
    -> Prepared {
  check(params);
  const auto& head = router_.head();
  const CellPrepared<T> cell = head.cell.prepare(params.cell, memory);
  Prepared prepared{memory.template take<typename Router::Prepared>(config_.layers)};
  for (Index l = 0; l < config_.layers; ++l) {
    const GruParams<const T> layer = layer_params<const T>(params, l);
    prepared.layers[l] = {rows::pack(layer.projection, memory), cell,
                          head.linear.prepare(layer.head, memory)};
  }
  return prepared;
}

template <class T>
std::size_t RecurrentStack<T>::pass_bytes(Index max_tokens, bool training) const noexcept {
  const Index layers = config_.layers, tables = training ? layers : 1;
  ByteCounter counter;
  counter.take<RoutingTable<T>>(tables);
  if (training) counter.take<typename Router::Tape>(layers);
  counter.take<T>(training ? layers : 2, saturating_product(max_tokens, config_.state));
  const std::size_t table =
      RoutingTable<T>::bytes(max_tokens, config_.experts, router_.max_per_token());
  counter.take<std::byte>(tables, static_cast<Index>(table));
  const std::size_t tape = training ? router_.tape_bytes(max_tokens) : 0;
  counter.take<std::byte>(layers, static_cast<Index>(tape));
  return counter.bytes();
}

template <class T>
auto RecurrentStack<T>::make_pass(Workspace& memory, Index max_tokens, bool training) const
    -> Pass {
  const Index layers = config_.layers;
  Pass pass;
  pass.tables = memory.template take<RoutingTable<T>>(training ? layers : 1);
  for (RoutingTable<T>& table : pass.tables) {
    table = RoutingTable<T>(memory, max_tokens, config_.experts, router_.max_per_token());
  }
  if (training) {
    pass.tapes = memory.template take<typename Router::Tape>(layers);
    for (auto& tape : pass.tapes) tape = router_.make_tape(memory, max_tokens);
  }
  pass.states =
      memory.template take<T>(training ? layers : 2, saturating_product(max_tokens, config_.state));
  return pass;
}

template <class T>
template <class Arena>
auto RecurrentStack<T>::take_gradient(Arena& arena, Index max_tokens) const ->
    typename Router::Tape {
  typename Router::Tape d;  // what the head keeps for itself has no gradient
  const RouterShape shape{config_.width, config_.experts, router_.max_per_token()};
  static_cast<RouterTape<T>&>(d) = take_tape<T>(arena, shape, max_tokens);
  d.side = {nullptr, max_tokens, 0};
  return d;
}

template <class T>
std::size_t RecurrentStack<T>::gradient_bytes(Index max_tokens) const noexcept {
  ByteCounter counter, tape;
  take_gradient(tape, max_tokens);
  counter.take<typename Router::Tape>(config_.layers);
  counter.take<std::byte>(config_.layers, static_cast<Index>(tape.bytes()));
  counter.take<T>(max_tokens, config_.state);
  counter.take<T>(max_tokens, config_.state);
  return counter.bytes();
}

template <class T>
auto RecurrentStack<T>::make_gradient(Workspace& memory, Index max_tokens) const -> Gradient {
  Gradient d;
  d.tapes = memory.template take<typename Router::Tape>(config_.layers);
  for (auto& tape : d.tapes) tape = take_gradient(memory, max_tokens);
  d.d_state = memory.template take<T>(max_tokens, config_.state);
  d.d_before = memory.template take<T>(max_tokens, config_.state);
  return d;
}

template <class T>
void RecurrentStack<T>::begin(Pass& pass, Index tokens, MatView<const T> start) const {
  require(!pass.tables.empty() && tokens >= 0 && tokens <= pass.tables[0].max_tokens(),
          Errc::limit_exceeded, "RecurrentStack: ", tokens, " tokens, the pass was made for ",
          pass.tables.empty() ? 0 : pass.tables[0].max_tokens());
  if (start.data != nullptr) require_shape("start", start, tokens, config_.state);
  pass.start = start;
  pass.tokens = tokens;
  pass.next = 0;
}

template <class T>
MatView<T> RecurrentStack<T>::state_rows(const Pass& pass, Index layer) const noexcept {
  return {pass.states.row(layer % pass.states.rows).data(), pass.tokens, config_.state};
}

template <class T>
MatView<const T> RecurrentStack<T>::state_after(const Pass& pass, Index count) const noexcept {
  return count == 0 ? pass.start : MatView<const T>(state_rows(pass, count - 1));
}

template <class T>
Routing<T> RecurrentStack<T>::route(Index layer, const Prepared& prepared, const Tokens<T>& tokens,
                                    const Overrides<T>& overrides, Pass& pass,
                                    const Context& context) const {
  require(layer == pass.next && layer < config_.layers, Errc::state_error, "RecurrentStack: layer ",
          layer, " of ", config_.layers, " is routed, expected layer ", pass.next);
  require(tokens.count() == pass.tokens, Errc::shape_mismatch, "RecurrentStack: layer ", layer,
          " has ", tokens.count(), " tokens, the pass began with ", pass.tokens);
  const bool training = !pass.tapes.empty();
  RoutingTable<T>& table = pass.tables[training ? layer : 0];
  router_.forward(prepared.layers[layer], {}, tokens, overrides, {state(pass)}, table,
                  {state_rows(pass, layer)}, training ? &pass.tapes[layer] : nullptr, context);
  ++pass.next;
  return table.view();
}

template <class T>
void RecurrentStack<T>::begin_backward(const Pass& pass, MatView<const T> d_last,
                                       Gradient& d) const {
  require(!pass.tapes.empty() && pass.next == config_.layers, Errc::state_error,
          "RecurrentStack: backward needs a training pass through all ", config_.layers,
          " layers, got ", pass.tapes.empty() ? 0 : pass.next);
  require(static_cast<Index>(d.tapes.size()) == config_.layers, Errc::shape_mismatch,
          "RecurrentStack: the gradient was made for ", d.tapes.size(), " layers, expected ",
          config_.layers);
  require(d.d_state.rows >= pass.tokens, Errc::limit_exceeded, "RecurrentStack: ", pass.tokens,
          " tokens, the gradient was made for ", d.d_state.rows);
  if (d_last.data != nullptr) require_shape("d_last", d_last, pass.tokens, config_.state);
  d.tokens = pass.tokens;
  d.next = config_.layers;
  for (auto& tape : d.tapes) params::zero(tape);
  const MatView<T> d_state = d.d_state.row_block(0, pass.tokens);
  rows::fill(d_state, 0);
  if (d_last.data != nullptr) rows::copy(d_last, d_state);
}

template <class T>
void RecurrentStack<T>::route_backward(Index layer, const Params<const T>& params, const Pass& pass,
                                       const Tokens<T>& tokens, const Overrides<T>& overrides,
                                       Gradient& d, MatView<T> dx, const Params<T>& grad,
                                       const Context& context) const {
  require(layer == d.next - 1 && layer >= 0, Errc::state_error, "RecurrentStack: layer ", layer,
          " goes back, expected layer ", d.next - 1);
  require(!pass.tapes.empty() && pass.tokens == d.tokens, Errc::state_error,
          "RecurrentStack: layer ", layer, " goes back through another pass than it began with");
  check(params);
  check_gradient(grad);
  const MatView<const T> before = state_after(pass, layer);
  const MatView<T> d_before = d.d_before.row_block(0, d.tokens);
  rows::fill(d_before, 0);
  const bool reaches = before.data != nullptr && !(config_.detach_state && layer > 0);
  router_.backward(layer_params<const T>(params, layer), {}, pass.tapes[layer], tokens, overrides,
                   {before}, pass.tables[layer].view(), d.tapes[layer],
                   {d.d_state.row_block(0, d.tokens)}, dx, layer_params<T>(grad, layer),
                   {reaches ? d_before : MatView<T>()}, context);
  std::swap(d.d_state, d.d_before);
  --d.next;
}

template <class T>
std::size_t RecurrentStack<T>::balance_bytes() const noexcept {
  ByteCounter counter;
  counter.take<BalancedLayer<T>>(config_.layers);
  counter.take<double>(config_.experts);
  counter.take<double>(config_.experts);
  return counter.bytes();
}

template <class T>
T RecurrentStack<T>::balance(BalanceLoss<T> loss, const Pass& pass, const Gradient* d,
                             const Context& context) const {
  require(!pass.tapes.empty() && pass.next == config_.layers, Errc::state_error,
          "RecurrentStack: the balance loss needs a training pass through all layers");
  const Workspace::Frame frame(context.scratch);
  const auto layers = context.scratch.template take<BalancedLayer<T>>(config_.layers);
  for (Index l = 0; l < config_.layers; ++l) {
    layers[l] = {pass.tables[l].view(), pass.tapes[l].prob,
                 d != nullptr ? d->tapes[l].prob : MatView<T>()};
  }
  loss.count_zero_gates = true;
  return balance_loss<T>(loss, std::span<const BalancedLayer<T>>(layers), context);
}

#ifndef MOLE_HEADER_ONLY
extern template class RecurrentStack<float>;
extern template class RecurrentStack<double>;
#endif

}  // namespace mole::inline MOLE_ABI

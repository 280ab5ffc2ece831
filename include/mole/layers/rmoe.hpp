// SPDX-License-Identifier: Apache-2.0
// Rmoe: a stack of mixture layers whose routers share one recurrent cell. Per layer, on its input
// x:
//
//   u = x, or norm ∘ x / sqrt(mean(x²) + epsilon)
//   h ← cell(P u, h)      g = softmax over the k largest of W h      recurrent_stack.hpp
//   m = Σ_e g_e f_e(u) + bias
//   m ← moe_weight · m + share_weight · D (act(G u) ∘ U u)              with a shared expert
//   m ← m + base u                                                      with a base map
//   x ← x + m, or m without residual
//
// A dense layer has no router and no experts: m = base u, and h passes it unchanged.
//
// Shapes: x [tokens, width]; norm, bias [layers, width]; base [layers · width, width]; G, U
// [layers · share, width]; D [layers · width, share]. The routers and the experts are those of the
// layers that are not dense, in order. Losses on the routers, such as `routers().balance`, add to
// the gradient between begin_backward and backward.
//
// Qiu et al., "Layerwise Recurrent Router for Mixture-of-Experts", 2024. Dense layers and the base
// map under low-rank experts are extensions.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/kernels/activation.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/layers/layer_checks.hpp"
#include "mole/layers/recurrent_stack.hpp"

namespace mole::inline MOLE_ABI {

/// Bank: the parameters of one layer's experts.
template <class V, class Bank>
struct RmoeParams {
  RecurrentStackParams<V> router;
  std::span<const Bank> experts;  ///< one for each layer that is not dense; of a gradient, or none
  MatView<V> norm = {}, base = {}, bias = {}, share_gate = {}, share_up = {}, share_down = {};

  /// Those of routed layer l; empty where there are none.
  Bank experts_of(std::size_t l) const noexcept { return l < experts.size() ? experts[l] : Bank{}; }

  template <class F, class P, class... More>
  static void visit(F&& f, P& p, More&... more) {
    visit_group<RecurrentStackParams<V>>(Leaf{"router"}, f, p.router, more.router...);
    for (std::size_t l = 0; l < p.experts.size(); ++l) {
      visit_group<Bank>(Leaf{"experts", static_cast<Index>(l)}, f, as_lvalue(p.experts_of(l)),
                        as_lvalue(more.experts_of(l))...);
    }
    f(Leaf{"norm"}, p.norm, more.norm...);
    f(Leaf{"base"}, p.base, more.base...);
    f(Leaf{"bias"}, p.bias, more.bias...);
    f(Leaf{"share_gate"}, p.share_gate, more.share_gate...);
    f(Leaf{"share_up"}, p.share_up, more.share_up...);
    f(Leaf{"share_down"}, p.share_down, more.share_down...);
  }

 private:
  template <class Part>
  static const Part& as_lvalue(const Part& part) noexcept {
    return part;
  }
};

template <ExpertBank B>
class Rmoe {
 public:
  using Scalar = typename B::Scalar;
  using T = Scalar;
  using Routers = RecurrentStack<T>;
  template <class V>
  using Params = RmoeParams<V, typename B::template Params<V>>;
  using Weights = RmoeParams<const T, typename B::Weights>;

  struct Config {
    Index layers = 0;
    Index state = 128;  ///< width of the cell
    Index k = 2;        ///< 1 ... experts
    CellKind cell = CellKind::gru;
    bool cell_bias = true;
    bool detach_state = false;
    bool renormalise = true;  ///< of the k gates
    bool residual = true;
    bool rms_norm = false;
    T norm_epsilon = T(1e-6);
    Index share = 0;  ///< width of the shared expert, 0: none
    T moe_weight = T(1), share_weight = T(1);
    Activation activation = Activation::silu;  ///< of the shared expert
    bool out_bias = false;
    bool base = false;
    std::vector<Index> dense_layers = {};  ///< ascending; needs `base`

    static constexpr std::string_view kind() noexcept { return "rmoe"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("layers"), c.layers...);
      f(Field::required("state"), c.state...);
      f(Field::required("k"), c.k...);
      f(Field{"cell"}, c.cell...);
      f(Field{"cell_bias"}, c.cell_bias...);
      f(Field{"detach_state"}, c.detach_state...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"residual"}, c.residual...);
      f(Field{"rms_norm"}, c.rms_norm...);
      f(Field{"norm_epsilon"}, c.norm_epsilon...);
      f(Field{"share"}, c.share...);
      f(Field{"moe_weight"}, c.moe_weight...);
      f(Field{"share_weight"}, c.share_weight...);
      f(Field{"activation"}, c.activation...);
      f(Field{"out_bias"}, c.out_bias...);
      f(Field{"base"}, c.base...);
      f(Field{"dense_layers"}, c.dense_layers...);
    }
  };

  struct Prepared {
    typename Routers::Prepared routers;
    std::span<typename B::Prepared> experts;                      ///< [routed layers]
    std::span<Panels<T>> base, share_gate, share_up, share_down;  ///< [layers], or empty
    MatView<const T> norm, bias;                                  ///< [layers, width], or empty
  };

  /// What a pass leaves behind. In inference there is one layer's worth of everything.
  struct Tape {
    typename Routers::Pass routers;
    std::span<typename B::Tape> experts;  ///< [routed layers], empty: inference
    MatView<T> input, output;             ///< [layers or 1, tokens · width], x and m of each layer
    MatView<T> normed;                    ///< likewise, u; empty without norm
    MatView<T> inverse;                   ///< [layers or 1, tokens], 1 / root mean square
    MatView<T> gate, up;                  ///< [layers or 1, tokens · share], G u and U u
    Index tokens = 0;

    MatView<T> layer_output(Index layer, Index width) const noexcept {
      return {output.row(layer % output.rows).data(), tokens, width};
    }
  };
  using Gradient = typename Routers::Gradient;

  /// `experts`: the bank of every layer, of equal input and output width. Throws invalid_argument,
  /// naming the field.
  Rmoe(B experts, Config config);

  const Config& config() const noexcept { return config_; }
  const B& experts() const noexcept { return experts_; }
  const Routers& routers() const noexcept { return routers_; }
  Index width() const noexcept { return experts_.input_width(); }
  bool is_dense(Index layer) const noexcept {
    return std::ranges::binary_search(config_.dense_layers, layer);
  }

  std::size_t params_bytes() const noexcept;
  /// Uninitialised parameters.
  Params<T> make_params(Workspace& memory) const;
  std::size_t prepared_bytes() const noexcept;
  /// Throws shape_mismatch, naming the member.
  Prepared prepare(const Weights& weights, Workspace& memory) const;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens, bool training = true) const noexcept;
  Tape make_tape(Workspace& memory, Index max_tokens, bool training = true) const;
  Gradient make_gradient(Workspace& memory, Index max_tokens) const {
    return routers_.make_gradient(memory, max_tokens);
  }

  /// y [tokens, width] is overwritten. `start` is h before the first layer, or empty. The last
  /// state is `routers().state(tape.routers)`. Throws shape_mismatch, limit_exceeded or
  /// out_of_memory before it writes.
  void forward(const Prepared& prepared, MatView<const T> x, MatView<const T> start, MatView<T> y,
               Tape& tape, const Context& context) const;

  /// Starts a way back: `d_last` is the gradient of the last state, or empty.
  void begin_backward(const Tape& tape, MatView<const T> d_last, Gradient& d) const {
    routers_.begin_backward(tape.routers, d_last, d);
  }
  /// Adds into dx and grad, whose members may be empty. The gradient of `start` is then
  /// `routers().d_start(d)`. Throws shape_mismatch or out_of_memory, state_error without a training
  /// tape of a whole forward or a begin_backward of its own, before it adds anything.
  void backward(const Weights& weights, const Tape& tape, MatView<const T> dy, Gradient& d,
                MatView<T> dx, const Params<T>& grad, const Context& context) const;

 private:
  struct Shapes {
    Index base, bias, norm, share;  // layers that have them
  };
  Shapes shapes() const noexcept {
    const Index layers = config_.layers;
    return {config_.base ? layers : 0, config_.out_bias ? layers : 0, config_.rms_norm ? layers : 0,
            config_.share > 0 ? layers : 0};
  }
  template <class Arena>
  void take_base(Arena& arena, Params<T>& params) const;
  template <class Arena>
  void take_rows(Arena& arena, Index max_tokens, bool training, Tape& tape) const;
  template <class P>
  void check(const P& params, bool optional) const;
  void check_backward(const Weights& weights, const Tape& tape, MatView<const T> dy,
                      const Gradient& d, MatView<T> dx, const Params<T>& grad,
                      const Context& context) const;
  static MatView<T> rows_of(MatView<T> all, Index layer, Index tokens, Index cols) noexcept {
    return {all.row(layer % all.rows).data(), tokens, cols};
  }
  MatView<const T> normalise(const Prepared& prepared, Index layer, MatView<const T> x,
                             const Tape& tape) const noexcept;
  void normalise_backward(const Weights& weights, Index layer, const Tape& tape,
                          MatView<const T> du, MatView<T> dx, const Params<T>& grad) const noexcept;
  void add_share(const Prepared& prepared, Index layer, MatView<const T> u, MatView<T> m,
                 const Tape& tape, const Context& context) const;
  void share_backward(const Weights& weights, Index layer, MatView<const T> u, MatView<const T> dm,
                      const Tape& tape, MatView<T> du, const Params<T>& grad,
                      const Context& context) const;
  void moe_backward(const Weights& weights, Index layer, Index routed, MatView<const T> u,
                    MatView<const T> dm, const Tape& tape, Gradient& d, MatView<T> du,
                    const Params<T>& grad, const Context& context) const;

  static typename Routers::Config router_config(const B& experts, const Config& config) {
    const auto dense = static_cast<Index>(config.dense_layers.size());
    return {.layers = config.layers - dense,
            .width = experts.input_width(),
            .experts = experts.experts(),
            .state = config.state,
            .k = config.k,
            .cell = config.cell,
            .cell_bias = config.cell_bias,
            .detach_state = config.detach_state,
            .renormalise = config.renormalise};
  }

  B experts_;
  Config config_;
  Routers routers_;
};

template <ExpertBank B>
Rmoe<B>::Rmoe(B experts, Config config)
    : experts_(std::move(experts)),
      config_(std::move(config)),
      routers_(router_config(experts_, config_)) {
  static_assert(!B::needs_base, "Rmoe hands no base product to its experts");
  require(experts_.input_width() == experts_.output_width(), Errc::invalid_argument,
          "Rmoe: the experts map ", experts_.input_width(), " to ", experts_.output_width(),
          ", expected equal widths");
  const auto& dense = config_.dense_layers;
  require_field(config_.share >= 0, "Rmoe", "share", "0 or more", config_.share);
  require_from_zero("Rmoe", "norm_epsilon", config_.norm_epsilon);
  require_finite("Rmoe", "moe_weight", config_.moe_weight);
  require_finite("Rmoe", "share_weight", config_.share_weight);
  require_field(dense.empty() || config_.base, "Rmoe", "dense_layers", "a base map",
                static_cast<Index>(dense.size()));
  for (std::size_t i = 0; i < dense.size(); ++i) {
    require_field(dense[i] >= (i == 0 ? 0 : dense[i - 1] + 1) && dense[i] < config_.layers, "Rmoe",
                  "dense_layers", "ascending layers", dense[i]);
  }
}

template <ExpertBank B>
template <class Arena>
void Rmoe<B>::take_base(Arena& arena, Params<T>& params) const {
  const Shapes has = shapes();
  const Index width = this->width(), share = config_.share;
  const auto take = [&](Index layers, Index rows, Index cols) {
    if (layers == 0) return MatView<T>();
    return arena.template take<T>(saturating_product(layers, rows), cols);
  };
  params.norm = take(has.norm, 1, width);
  params.base = take(has.base, width, width);
  params.bias = take(has.bias, 1, width);
  params.share_gate = take(has.share, share, width);
  params.share_up = take(has.share, share, width);
  params.share_down = take(has.share, width, share);
}

template <ExpertBank B>
std::size_t Rmoe<B>::params_bytes() const noexcept {
  ByteCounter counter;
  Params<T> params;
  take_base(counter, params);
  counter.take<typename B::template Params<T>>(routers_.layers());
  counter.take<std::byte>(routers_.layers(),
                          static_cast<Index>(experts_.template params_bytes<T>()));
  return counter.bytes() + routers_.params_bytes();
}

template <ExpertBank B>
auto Rmoe<B>::make_params(Workspace& memory) const -> Params<T> {
  Params<T> params;
  params.router = routers_.make_params(memory);
  const auto list = memory.take<typename B::template Params<T>>(routers_.layers());
  for (auto& layer : list) layer = experts_.template make_params<T>(memory);
  params.experts = list;
  take_base(memory, params);
  return params;
}

template <ExpertBank B>
template <class P>
void Rmoe<B>::check(const P& params, bool optional) const {
  const Shapes has = shapes();
  const Index width = this->width(), share = config_.share;
  const auto fits = [&](const char* name, const auto& view, Index layers, Index rows, Index cols) {
    if (optional && view.data == nullptr) return;
    const bool here = layers > 0;
    if (!here && view.empty()) return;
    require_shape(name, view, saturating_product(layers, rows), here ? cols : 0);
  };
  fits("norm", params.norm, has.norm, 1, width);
  fits("base", params.base, has.base, width, width);
  fits("bias", params.bias, has.bias, 1, width);
  fits("share_gate", params.share_gate, has.share, share, width);
  fits("share_up", params.share_up, has.share, share, width);
  fits("share_down", params.share_down, has.share, width, share);
  const auto lists = static_cast<Index>(params.experts.size());
  require((optional && lists == 0) || lists == routers_.layers(), Errc::shape_mismatch,
          "experts: expected those of ", routers_.layers(), " layers, got ", lists);
}

template <ExpertBank B>
std::size_t Rmoe<B>::prepared_bytes() const noexcept {
  ByteCounter counter;
  Params<T> params;
  take_base(counter, params);
  for (int part = 0; part < 4; ++part) counter.take<Panels<T>>(config_.layers);
  // Each panel is a piece of its own, with its own alignment.
  counter.take<std::byte>(config_.layers, static_cast<Index>(4 * kAlignment));
  counter.take<typename B::Prepared>(routers_.layers());
  counter.take<std::byte>(routers_.layers(), static_cast<Index>(experts_.prepared_bytes()));
  return counter.bytes() + routers_.prepared_bytes();
}

template <ExpertBank B>
auto Rmoe<B>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  check(weights, false);
  Prepared prepared;
  prepared.routers = routers_.prepare(weights.router, memory);
  prepared.experts = memory.take<typename B::Prepared>(routers_.layers());
  for (Index r = 0; r < routers_.layers(); ++r) {
    prepared.experts[r] = experts_.prepare(weights.experts[r], memory);
  }
  const auto pack = [&](MatView<const T> stack, Index layers, Index each) {
    const auto panels = memory.take<Panels<T>>(layers);
    for (Index l = 0; l < layers; ++l) panels[l] = rows::pack(rows::block(stack, l, each), memory);
    return panels;
  };
  const Shapes has = shapes();
  prepared.base = pack(weights.base, has.base, width());
  prepared.share_gate = pack(weights.share_gate, has.share, config_.share);
  prepared.share_up = pack(weights.share_up, has.share, config_.share);
  prepared.share_down = pack(weights.share_down, has.share, width());
  prepared.norm = rows::clone(weights.norm, memory);
  prepared.bias = rows::clone(weights.bias, memory);
  return prepared;
}

template <ExpertBank B>
std::size_t Rmoe<B>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  const Index slots = saturating_product(max_tokens, config_.k);
  ByteCounter counter;
  for (int part = 0; part < 3; ++part) counter.take<T>(max_tokens, width());
  for (int part = 0; part < 4; ++part) counter.take<T>(max_tokens, config_.share);
  counter.take<std::int32_t>(max_tokens);
  return counter.bytes() + bank_params_bytes(experts_) +
         std::max(routers_.scratch_bytes(max_tokens, workers),
                  experts_.scratch_bytes(max_tokens, slots, workers));
}

template <ExpertBank B>
template <class Arena>
void Rmoe<B>::take_rows(Arena& arena, Index max_tokens, bool training, Tape& tape) const {
  const Index layers = training ? config_.layers : 1;
  const Index cells = saturating_product(max_tokens, width());
  const Index share = saturating_product(max_tokens, config_.share);
  tape.input = arena.template take<T>(layers, cells);
  tape.output = arena.template take<T>(layers, cells);
  if (config_.rms_norm) {
    tape.normed = arena.template take<T>(layers, cells);
    tape.inverse = arena.template take<T>(layers, max_tokens);
  }
  if (config_.share > 0) {
    tape.gate = arena.template take<T>(layers, share);
    tape.up = arena.template take<T>(layers, share);
  }
}

template <ExpertBank B>
std::size_t Rmoe<B>::tape_bytes(Index max_tokens, bool training) const noexcept {
  ByteCounter counter;
  Tape tape;
  take_rows(counter, max_tokens, training, tape);
  if (training) {
    counter.take<typename B::Tape>(routers_.layers());
    const std::size_t each =
        experts_.tape_bytes(max_tokens, saturating_product(max_tokens, config_.k));
    counter.take<std::byte>(routers_.layers(), static_cast<Index>(each));
  }
  return counter.bytes() + routers_.pass_bytes(max_tokens, training);
}

template <ExpertBank B>
auto Rmoe<B>::make_tape(Workspace& memory, Index max_tokens, bool training) const -> Tape {
  Tape tape;
  tape.routers = routers_.make_pass(memory, max_tokens, training);
  take_rows(memory, max_tokens, training, tape);
  if (!training) return tape;
  tape.experts = memory.take<typename B::Tape>(routers_.layers());
  const Index slots = saturating_product(max_tokens, config_.k);
  for (auto& experts : tape.experts) experts = experts_.make_tape(memory, max_tokens, slots);
  return tape;
}

template <ExpertBank B>
auto Rmoe<B>::normalise(const Prepared& prepared, Index layer, MatView<const T> x,
                        const Tape& tape) const noexcept -> MatView<const T> {
  if (!config_.rms_norm) return x;
  const MatView<T> u = rows_of(tape.normed, layer, x.rows, x.cols);
  const MatView<T> inverse = rows_of(tape.inverse, layer, 1, x.rows);
  for (Index t = 0; t < x.rows; ++t) {
    double sum = 0;
    for (const double value : x.row(t)) sum = std::fma(value, value, sum);
    const double mean = sum / static_cast<double>(x.cols);
    inverse(0, t) = static_cast<T>(1 / std::sqrt(mean + config_.norm_epsilon));
    for (Index i = 0; i < x.cols; ++i) {
      u(t, i) = prepared.norm(layer, i) * (x(t, i) * inverse(0, t));
    }
  }
  return u;
}

template <ExpertBank B>
void Rmoe<B>::normalise_backward(const Weights& weights, Index layer, const Tape& tape,
                                 MatView<const T> du, MatView<T> dx,
                                 const Params<T>& grad) const noexcept {
  if (!config_.rms_norm) return rows::add(1, du, dx);
  const MatView<const T> x = rows_of(tape.input, layer, du.rows, du.cols);
  const MatView<const T> inverse = rows_of(tape.inverse, layer, 1, du.rows);
  for (Index t = 0; t < du.rows; ++t) {
    const T scale = inverse(0, t);
    double sum = 0;  // of d(x / rms) times x / rms
    for (Index i = 0; i < du.cols; ++i) {
      const double part = du(t, i) * weights.norm(layer, i);
      sum = std::fma(part, static_cast<double>(x(t, i) * scale), sum);
    }
    const T mean = static_cast<T>(sum / static_cast<double>(du.cols));
    for (Index i = 0; i < du.cols; ++i) {
      const T unit = x(t, i) * scale;
      const T direct = std::fma(du(t, i), weights.norm(layer, i), -(unit * mean));
      dx(t, i) = std::fma(scale, direct, dx(t, i));
      if (grad.norm.data == nullptr) continue;
      grad.norm(layer, i) = std::fma(du(t, i), unit, grad.norm(layer, i));
    }
  }
}

template <ExpertBank B>
void Rmoe<B>::add_share(const Prepared& prepared, Index layer, MatView<const T> u, MatView<T> m,
                        const Tape& tape, const Context& context) const {
  if (config_.share == 0) return;
  const Workspace::Frame frame(context.scratch);
  const MatView<T> gate = rows_of(tape.gate, layer, u.rows, config_.share);
  const MatView<T> up = rows_of(tape.up, layer, u.rows, config_.share);
  const MatView<T> hidden = context.scratch.template take<T>(u.rows, config_.share);
  const MatView<T> share = context.scratch.template take<T>(u.rows, u.cols);
  dense::forward<T>(prepared.share_gate[layer], {}, u, gate, context);
  dense::forward<T>(prepared.share_up[layer], {}, u, up, context);
  gated::activate<T>(config_.activation, rows::every(u.rows, context.scratch), gate, up, hidden,
                     context);
  dense::forward<T>(prepared.share_down[layer], {}, hidden, share, context);
  for (Index t = 0; t < m.rows; ++t) {
    for (Index i = 0; i < m.cols; ++i) {
      m(t, i) = std::fma(config_.share_weight, share(t, i), config_.moe_weight * m(t, i));
    }
  }
}

template <ExpertBank B>
void Rmoe<B>::forward(const Prepared& prepared, MatView<const T> x, MatView<const T> start,
                      MatView<T> y, Tape& tape, const Context& context) const {
  const Index tokens = x.rows, width = this->width();
  require_shape("x", x, tokens, width);
  require_shape("y", y, tokens, width);
  require_apart("y", y, "x", x);
  routers_.begin(tape.routers, tokens, start);
  require_scratch(context, scratch_bytes(tokens, context.workers));
  tape.tokens = tokens;
  rows::copy(x, y);
  Index routed = 0;
  for (Index l = 0; l < config_.layers; ++l) {
    const Workspace::Frame frame(context.scratch);
    const MatView<T> input = rows_of(tape.input, l, tokens, width);
    const MatView<T> m = rows_of(tape.output, l, tokens, width);
    rows::copy<T>(y, input);
    const MatView<const T> u = normalise(prepared, l, input, tape);
    rows::fill(m, 0);
    if (!is_dense(l)) {
      const Routing<T> routing =
          routers_.route(routed, prepared.routers, {.x = u}, {}, tape.routers, context);
      experts_.forward(prepared.experts[routed], {.x = u}, routing, m,
                       tape.experts.empty() ? nullptr : &tape.experts[routed], context);
      if (config_.out_bias) {
        for (Index t = 0; t < tokens; ++t) {
          for (Index i = 0; i < width; ++i) m(t, i) += prepared.bias(l, i);
        }
      }
      add_share(prepared, l, u, m, tape, context);
      ++routed;
    }
    if (config_.base) {
      const MatView<T> base = context.scratch.template take<T>(tokens, width);
      dense::forward<T>(prepared.base[l], {}, u, base, context);
      rows::add<T>(1, base, m);
    }
    if (config_.residual) {
      rows::add<T>(1, m, y);
    } else {
      rows::copy<T>(m, y);
    }
  }
}

template <ExpertBank B>
void Rmoe<B>::share_backward(const Weights& weights, Index layer, MatView<const T> u,
                             MatView<const T> dm, const Tape& tape, MatView<T> du,
                             const Params<T>& grad, const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const Index share = config_.share, tokens = u.rows;
  const MatView<const T> gate = rows_of(tape.gate, layer, tokens, share);
  const MatView<const T> up = rows_of(tape.up, layer, tokens, share);
  const auto list = rows::every(tokens, context.scratch);
  const auto take = [&] { return context.scratch.template take<T>(tokens, share); };
  const MatView<T> hidden = take(), d_hidden = take(), d_gate = take(), d_up = take();
  const MatView<T> d_share = context.scratch.template take<T>(tokens, u.cols);
  rows::fill(d_share, 0);
  rows::add<T>(config_.share_weight, dm, d_share);
  rows::fill(d_hidden, 0);
  dense::input_gradient<T>(rows::block(weights.share_down, layer, u.cols), d_share, d_hidden,
                           context);
  gated::activate<T>(config_.activation, list, gate, up, hidden, context);
  gated::activate_backward<T>(config_.activation, list, gate, up, d_hidden, d_gate, d_up, context);
  const auto weight_gradient = [&](MatView<const T> in, MatView<const T> d_out, MatView<T> stack,
                                   Index each) {
    if (stack.data == nullptr) return;
    dense::weight_gradient<T>(in, d_out, rows::block(stack, layer, each), context);
  };
  weight_gradient(hidden, d_share, grad.share_down, u.cols);
  weight_gradient(u, d_gate, grad.share_gate, share);
  weight_gradient(u, d_up, grad.share_up, share);
  dense::input_gradient<T>(rows::block(weights.share_gate, layer, share), d_gate, du, context);
  dense::input_gradient<T>(rows::block(weights.share_up, layer, share), d_up, du, context);
}

template <ExpertBank B>
void Rmoe<B>::moe_backward(const Weights& weights, Index layer, Index routed, MatView<const T> u,
                           MatView<const T> dm, const Tape& tape, Gradient& d, MatView<T> du,
                           const Params<T>& grad, const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  MatView<const T> d_moe = dm;
  if (config_.share > 0) {
    share_backward(weights, layer, u, dm, tape, du, grad, context);
    const MatView<T> weighted = context.scratch.template take<T>(dm.rows, dm.cols);
    rows::fill(weighted, 0);
    rows::add<T>(config_.moe_weight, dm, weighted);
    d_moe = weighted;
  }
  if (config_.out_bias && grad.bias.data != nullptr) {
    dense::bias_gradient<T>(d_moe, rows::block(grad.bias, layer, 1));
  }
  const Routing<T> routing = tape.routers.tables[routed].view();
  experts_.backward(weights.experts[routed], tape.experts[routed], {.x = u}, routing, d_moe,
                    d.tapes[routed].gate.row(0), {.x = du},
                    grad.experts_of(static_cast<std::size_t>(routed)), context);
  routers_.route_backward(routed, weights.router, tape.routers, {.x = u}, {}, d, du, grad.router,
                          context);
}

template <ExpertBank B>
void Rmoe<B>::check_backward(const Weights& weights, const Tape& tape, MatView<const T> dy,
                             const Gradient& d, MatView<T> dx, const Params<T>& grad,
                             const Context& context) const {
  const Index tokens = tape.tokens, layers = routers_.layers();
  require(static_cast<Index>(tape.experts.size()) == layers && tape.routers.next == layers,
          Errc::state_error, "Rmoe: backward needs a training tape of a whole forward");
  require(d.next == layers && d.tokens == tokens, Errc::state_error,
          "Rmoe: backward needs a begin_backward of its own");
  check(weights, false);
  check(grad, true);
  routers_.check(weights.router);
  routers_.check_gradient(grad.router);
  require_shape("dy", dy, tokens, width());
  if (dx.data != nullptr) require_shape("dx", dx, tokens, width());
  require_scratch(context, scratch_bytes(tokens, context.workers));
  for (std::size_t r = 0; r < weights.experts.size(); ++r) {
    require_bank_params(experts_, weights.experts[r], grad.experts_of(r), context);
  }
}

template <ExpertBank B>
void Rmoe<B>::backward(const Weights& weights, const Tape& tape, MatView<const T> dy, Gradient& d,
                       MatView<T> dx, const Params<T>& grad, const Context& context) const {
  const Index tokens = tape.tokens, width = this->width();
  const Workspace::Frame frame(context.scratch);
  check_backward(weights, tape, dy, d, dx, grad, context);
  const MatView<T> flow = context.scratch.template take<T>(tokens, width);  // by what a layer gives
  const MatView<T> du = context.scratch.template take<T>(tokens, width);
  rows::copy(dy, flow);
  Index routed = routers_.layers();
  for (Index l = config_.layers - 1; l >= 0; --l) {
    const MatView<const T> x = rows_of(tape.input, l, tokens, width);
    const MatView<const T> u =
        config_.rms_norm ? MatView<const T>(rows_of(tape.normed, l, tokens, width)) : x;
    rows::fill(du, 0);
    if (config_.base) {
      dense::input_gradient<T>(rows::block(weights.base, l, width), flow, du, context);
    }
    if (config_.base && grad.base.data != nullptr) {
      dense::weight_gradient<T>(u, flow, rows::block(grad.base, l, width), context);
    }
    if (!is_dense(l)) {
      moe_backward(weights, l, --routed, u, flow, tape, d, du, grad, context);
    }
    if (!config_.residual) rows::fill(flow, 0);
    normalise_backward(weights, l, tape, du, flow, grad);
  }
  if (dx.data != nullptr) rows::add<T>(1, flow, dx);
}

}  // namespace mole::inline MOLE_ABI

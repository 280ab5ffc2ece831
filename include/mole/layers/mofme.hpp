// SPDX-License-Identifier: Apache-2.0
// Mofme: the feed-forward block of MoFME, whose experts modulate one shared hidden state.
//
//   l = LayerNorm(x)      u = gelu(W_a l + b_a) ∘ (W_b l + b_b)
//   m = Σ_e g_e M_e(u)    M_e(u) = (Γ_e u + γ_e) ∘ u + (Ξ_e u + ξ_e)      experts/film_bank.hpp
//   y = x + W₂ gelu(W₁ m + b₁) + b₂
//
// Shapes: x, y [tokens, width]; norm, shift [1, width]; W_a, W_b [width, width]; W₁ [hidden,
// width], W₂ [width, hidden]. The router reads the raw x. The released one keeps equals of the k-th
// (TieTopKRouter); UncertaintyRouter is the paper's.
//
// Zhang et al., "Efficient Deweather Mixture-of-Experts with Uncertainty-Aware Feature-Wise Linear
// Modulation", AAAI 2024.
#pragma once

#include <algorithm>
#include <cmath>

#include "mole/core/config.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/film_bank.hpp"
#include "mole/kernels/activation.hpp"
#include "mole/kernels/norm.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/routing/head.hpp"
#include "mole/routing/stages.hpp"

namespace mole::inline MOLE_ABI {

/// Mix: the parameters of the mixture.
template <class V, class Mix>
struct MofmeParams {
  MatView<V> norm, shift;        ///< scale and shift of the layer norm
  LinearParams<V> gate, value;   ///< W_a, b_a and W_b, b_b
  Mix mixture;                   ///< router.*, experts.*
  LinearParams<V> inner, outer;  ///< W₁, b₁ and W₂, b₂

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"norm"}, p.norm...);
    f(Leaf{"shift"}, p.shift...);
    visit_group<LinearParams<V>>(Leaf{"gate"}, f, p.gate...);
    visit_group<LinearParams<V>>(Leaf{"value"}, f, p.value...);
    visit_group<Mix>(Leaf{"mixture"}, f, p.mixture...);
    visit_group<LinearParams<V>>(Leaf{"inner"}, f, p.inner...);
    visit_group<LinearParams<V>>(Leaf{"outer"}, f, p.outer...);
  }
};

template <Router R>
class Mofme {
 public:
  using Scalar = typename R::Scalar;
  using T = Scalar;
  using Experts = Mixture<R, FilmBank<T>>;
  using Buffers = typename R::Buffers;
  template <class V>
  using Params = MofmeParams<V, typename Experts::template Params<V>>;
  using Weights = MofmeParams<const T, typename Experts::Weights>;

  struct Config {
    Index hidden = 0;  ///< width between W₁ and W₂
    T norm_epsilon = T(1e-5);
    bool shifted = false;  ///< expert 0 is gelu, the others are one late: the released code

    static constexpr std::string_view kind() noexcept { return "mofme"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("hidden"), c.hidden...);
      f(Field{"norm_epsilon"}, c.norm_epsilon...);
      f(Field{"shifted"}, c.shifted...);
    }
  };

  struct Prepared {
    MatView<const T> norm, shift;
    LinearPrepared<T> gate, value, inner, outer;
    typename Experts::Prepared mixture;
  };

  struct Tape {
    MatView<T> unit, normed;  ///< [tokens, width], before and after scale and shift
    MatView<T> inverse;       ///< [1, tokens]
    MatView<T> gate, value;   ///< [tokens, width], W_a l + b_a and W_b l + b_b
    MatView<T> u, mixed;      ///< [tokens, width], m is `mixed`
    MatView<T> inner;         ///< [tokens, hidden], W₁ m + b₁
    typename Experts::Tape mixture;
    Index tokens = 0;
  };

  /// Throws invalid_argument, naming the field.
  Mofme(R router, const Config& config);

  const Config& config() const noexcept { return config_; }
  const Experts& mixture() const noexcept { return mixture_; }
  const R& router() const noexcept { return mixture_.router(); }
  Index width() const noexcept { return mixture_.input_width(); }

  std::size_t params_bytes() const noexcept;
  Params<T> make_params(Workspace& memory) const;
  std::size_t prepared_bytes() const noexcept;
  /// Throws shape_mismatch, naming the member.
  Prepared prepare(const Weights& weights, Workspace& memory) const;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;
  Tape make_tape(Workspace& memory, Index max_tokens) const;

  /// y is overwritten. `input.x` [tokens, width] is read by router and block. Throws
  /// shape_mismatch or limit_exceeded.
  void forward(const Prepared& prepared, const Buffers& buffers, const LayerInput<T>& input,
               MatView<T> y, Tape& tape, const Context& context) const;

  /// `d_tape` holds the gradients that losses added to the router's tape. Adds into dx and grad,
  /// whose members may be empty.
  void backward(const Weights& weights, const Buffers& buffers, const Tape& tape,
                const LayerInput<T>& input, MatView<const T> dy, const typename R::Tape& d_tape,
                MatView<T> dx, const Params<T>& grad, const Context& context) const;

 private:
  template <class Arena>
  void take_rows(Arena& arena, Index tokens, Tape& tape) const;
  template <class Arena>
  void take_norm(Arena& arena, Params<T>& params) const {
    params.norm = arena.template take<T>(1, width());
    params.shift = arena.template take<T>(1, width());
  }
  void normalise(const Prepared& prepared, MatView<const T> x, const Tape& tape) const noexcept;
  void normalise_backward(const Weights& weights, const Tape& tape, MatView<const T> dl,
                          MatView<T> dx, const Params<T>& grad) const noexcept;
  static LayerInput<T> hidden_input(const LayerInput<T>& input, MatView<const T> u) {
    LayerInput<T> hidden = input;
    hidden.x = u;
    hidden.router_x = input.x;
    return hidden;
  }

  Experts mixture_;
  Config config_;
  Linear<T> square_, inner_, outer_;
};

template <Router R>
Mofme<R>::Mofme(R router, const Config& config)
    : mixture_(router, FilmBank<T>({.width = router.input_width(),
                                    .experts = router.experts(),
                                    .shifted = config.shifted})),
      config_(config),
      square_{width(), width(), true},
      inner_{width(), config.hidden, true},
      outer_{config.hidden, width(), true} {
  require_count("Mofme", "hidden", config.hidden);
  require_from_zero("Mofme", "norm_epsilon", config.norm_epsilon);
}

template <Router R>
std::size_t Mofme<R>::params_bytes() const noexcept {
  ByteCounter counter;
  Params<T> params;
  take_norm(counter, params);
  return counter.bytes() + 2 * square_.params_bytes() + router().params_bytes() +
         mixture_.experts().template params_bytes<T>() + inner_.params_bytes() +
         outer_.params_bytes();
}

template <Router R>
auto Mofme<R>::make_params(Workspace& memory) const -> Params<T> {
  Params<T> params;
  take_norm(memory, params);
  params.gate = square_.make_params(memory);
  params.value = square_.make_params(memory);
  params.mixture.router = router().make_params(memory);
  params.mixture.experts = mixture_.experts().template make_params<T>(memory);
  params.inner = inner_.make_params(memory);
  params.outer = outer_.make_params(memory);
  return params;
}

template <Router R>
std::size_t Mofme<R>::prepared_bytes() const noexcept {
  ByteCounter counter;
  Params<T> params;
  take_norm(counter, params);
  return counter.bytes() + 2 * square_.prepared_bytes() + mixture_.prepared_bytes() +
         inner_.prepared_bytes() + outer_.prepared_bytes();
}

template <Router R>
auto Mofme<R>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  require_shape("norm", weights.norm, 1, width());
  require_shape("shift", weights.shift, 1, width());
  Prepared prepared;
  prepared.norm = rows::clone(weights.norm, memory);
  prepared.shift = rows::clone(weights.shift, memory);
  prepared.gate = square_.prepare(weights.gate, memory);
  prepared.value = square_.prepare(weights.value, memory);
  prepared.mixture = mixture_.prepare(weights.mixture, memory);
  prepared.inner = inner_.prepare(weights.inner, memory);
  prepared.outer = outer_.prepare(weights.outer, memory);
  return prepared;
}

template <Router R>
std::size_t Mofme<R>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  ByteCounter counter;
  counter.take<std::int32_t>(max_tokens);
  for (int part = 0; part < 5; ++part) counter.take<T>(max_tokens, width());
  for (int part = 0; part < 3; ++part) counter.take<T>(max_tokens, config_.hidden);
  return counter.bytes() + mixture_.scratch_bytes(max_tokens, workers) +
         stages::project_backward_bytes(std::max(width(), config_.hidden));
}

template <Router R>
template <class Arena>
void Mofme<R>::take_rows(Arena& arena, Index tokens, Tape& tape) const {
  const auto take = [&] { return arena.template take<T>(tokens, width()); };
  tape.unit = take();
  tape.normed = take();
  tape.inverse = arena.template take<T>(1, tokens);
  tape.gate = take();
  tape.value = take();
  tape.u = take();
  tape.mixed = take();
  tape.inner = arena.template take<T>(tokens, config_.hidden);
}

template <Router R>
std::size_t Mofme<R>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  Tape tape;
  take_rows(counter, max_tokens, tape);
  return counter.bytes() + mixture_.tape_bytes(max_tokens);
}

template <Router R>
auto Mofme<R>::make_tape(Workspace& memory, Index max_tokens) const -> Tape {
  Tape tape;
  take_rows(memory, max_tokens, tape);
  tape.mixture = mixture_.make_tape(memory, max_tokens);
  return tape;
}

template <Router R>
void Mofme<R>::normalise(const Prepared& prepared, MatView<const T> x,
                         const Tape& tape) const noexcept {
  for (Index t = 0; t < x.rows; ++t) {
    const std::span<T> unit = tape.unit.row(t);
    tape.inverse(0, t) = norm::standardise<T>(x.row(t), config_.norm_epsilon, true, unit);
    for (Index i = 0; i < width(); ++i) {
      tape.normed(t, i) = std::fma(prepared.norm(0, i), unit[i], prepared.shift(0, i));
    }
  }
}

template <Router R>
void Mofme<R>::normalise_backward(const Weights& weights, const Tape& tape, MatView<const T> dl,
                                  MatView<T> dx, const Params<T>& grad) const noexcept {
  for (Index t = 0; t < dl.rows; ++t) {
    const std::span<T> unit = tape.unit.row(t), d_unit = tape.normed.row(t);
    for (Index i = 0; i < width(); ++i) {
      if (grad.norm.data != nullptr) grad.norm(0, i) = std::fma(dl(t, i), unit[i], grad.norm(0, i));
      if (grad.shift.data != nullptr) grad.shift(0, i) += dl(t, i);
      d_unit[i] = dl(t, i) * weights.norm(0, i);
    }
    if (dx.data == nullptr) continue;
    norm::standardise_backward<T>(unit, d_unit, tape.inverse(0, t), true, dx.row(t));
  }
}

template <Router R>
void Mofme<R>::forward(const Prepared& prepared, const Buffers& buffers, const LayerInput<T>& input,
                       MatView<T> y, Tape& tape, const Context& context) const {
  const Index tokens = input.x.rows;
  require_shape("x", input.x, tokens, width());
  require_shape("y", y, tokens, width());
  require_apart("y", y, "x", input.x);
  require(tape.u.rows >= tokens, Errc::limit_exceeded, "Mofme: ", tokens,
          " tokens, the tape was made for ", tape.u.rows);
  const Workspace::Frame frame(context.scratch);
  const auto first = [&](MatView<T> rows) { return rows.row_block(0, tokens); };
  const auto list = rows::every(tokens, context.scratch);
  tape.tokens = tokens;
  normalise(prepared, input.x, tape);
  stages::project<T>(prepared.gate, first(tape.normed), first(tape.gate), context);
  stages::project<T>(prepared.value, first(tape.normed), first(tape.value), context);
  gated::activate<T>(Activation::gelu, list, tape.gate, tape.value, tape.u, context);
  const MatView<T> mixed = first(tape.mixed);
  rows::fill(mixed, 0);
  mixture_.forward(prepared.mixture, buffers, hidden_input(input, first(tape.u)), {}, mixed, {},
                   &tape.mixture, context);
  const MatView<T> active = context.scratch.template take<T>(tokens, config_.hidden);
  stages::project<T>(prepared.inner, mixed, first(tape.inner), context);
  gated::activate<T>(Activation::gelu, list, tape.inner, {}, active, context);
  stages::project<T>(prepared.outer, active, y, context);
  rows::add<T>(1, input.x, y);
}

template <Router R>
void Mofme<R>::backward(const Weights& weights, const Buffers& buffers, const Tape& tape,
                        const LayerInput<T>& input, MatView<const T> dy,
                        const typename R::Tape& d_tape, MatView<T> dx, const Params<T>& grad,
                        const Context& context) const {
  const Index tokens = tape.tokens;
  require_shape("x", input.x, tokens, width());
  require_shape("dy", dy, tokens, width());
  if (dx.data != nullptr) require_shape("dx", dx, tokens, width());
  const Workspace::Frame frame(context.scratch);
  const auto first = [&](MatView<T> rows) { return rows.row_block(0, tokens); };
  const auto take = [&](Index cols) {
    const MatView<T> rows = context.scratch.template take<T>(tokens, cols);
    rows::fill(rows, 0);
    return rows;
  };
  const auto list = rows::every(tokens, context.scratch);
  const MatView<T> active = take(config_.hidden), d_active = take(config_.hidden);
  const MatView<T> d_inner = take(config_.hidden), d_mixed = take(width());
  gated::activate<T>(Activation::gelu, list, tape.inner, {}, active, context);
  stages::project_backward<T>(weights.outer, active, dy, d_active, grad.outer, context);
  gated::activate_backward<T>(Activation::gelu, list, tape.inner, {}, d_active, d_inner, {},
                              context);
  stages::project_backward<T>(weights.inner, first(tape.mixed), d_inner, d_mixed, grad.inner,
                              context);
  const MatView<T> du = take(width()), d_gate = take(width()), d_value = take(width());
  const MatView<T> dl = take(width());
  const LayerInput<T> hidden = hidden_input(input, first(tape.u));
  mixture_.backward(weights.mixture, buffers, tape.mixture, hidden, {}, d_mixed, d_tape, {},
                    {.x = du, .router_x = dx}, grad.mixture, {}, context);
  gated::activate_backward<T>(Activation::gelu, list, tape.gate, tape.value, du, d_gate, d_value,
                              context);
  stages::project_backward<T>(weights.gate, first(tape.normed), d_gate, dl, grad.gate, context);
  stages::project_backward<T>(weights.value, first(tape.normed), d_value, dl, grad.value, context);
  Tape work = tape;  // its views: the gradient of the unit rows needs rows of its own
  work.normed = d_gate;
  normalise_backward(weights, work, dl, dx, grad);
  if (dx.data != nullptr) rows::add<T>(1, dy, dx);
}

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// GruRouter: a router that remembers over depth. The layers of a stack share one recurrent cell,
// whose state goes from layer to layer with the token.
//
//   x' = P x      h' = cell(x', h)      l = h' Wᵀ (+ b, + overrides)
//   S = the k largest l, ties to the lower expert      g = softmax of l over S, or, without
//   renormalise, the softmax over all experts on S
//
// Shapes: x [tokens, width], P [state, width], W [experts, state], h, h' [tokens, state]. P and W
// are the layer's own. The cell belongs to the stack: Params looks at it and visit does not name
// it, so that saving, counting and optimisers see it once; as gradients, all layers' Params look at
// the same memory and add into it.
//
// carry_in.state is h, empty for a zero state; carry_out.state receives h'. To stop the gradient
// between layers, hand no d_carry_in on. With k = 1 the gate is 1 and the router learns from
// losses.
//
// Qiu et al., "Layerwise Recurrent Router for Mixture-of-Experts", 2024; the released code keeps
// the gradient through depth and divides the chosen scores by their sum.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/recurrent_cell.hpp"
#include "mole/routing/top_k_rule.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct GruParams {
  MatView<V> projection;  ///< P [state, width]
  LinearParams<V> head;   ///< W [experts, state], b
  CellParams<V> cell;     ///< the stack's

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"projection"}, p.projection...);
    visit_group<LinearParams<V>>(Leaf{"head"}, f, p.head...);
  }
  operator GruParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {projection, head, cell};
  }
};

template <class T>
struct GruHead {
  Index input_width = 0;
  RecurrentCell<T> cell;
  Linear<T> linear;  ///< from the state to the logits

  template <class V>
  using Params = GruParams<V>;
  struct Prepared {
    Panels<T> projection;
    CellPrepared<T> cell;
    LinearPrepared<T> head;
  };
  struct Tape {
    MatView<T> projected;  ///< [tokens, state], x'
    CellTape<T> cell;
  };
  template <class V>
  struct Carry {
    MatView<V> state = {};  ///< [tokens, state], or empty

    operator Carry<const V>() const noexcept  // NOLINT(google-explicit-constructor)
        requires(!std::is_const_v<V>) {
      return {state};
    }
  };
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return input_width; }
  Index experts() const noexcept { return linear.experts; }
  Index side() const noexcept { return 0; }

  /// Without the cell, which is the stack's.
  std::size_t params_bytes() const noexcept;
  std::size_t prepared_bytes() const noexcept;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  Params<T> make_params(Workspace& memory) const;
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index tokens) const {
    return {arena.template take<T>(tokens, cell.state), cell.take_tape(arena, tokens)};
  }
  void check(const Params<const T>& params) const;
  void check_gradient(const Params<T>& grad) const;

  void forward(const Prepared& prepared, const Tokens<T>& tokens, const Carry<const T>& carry_in,
               MatView<T> logits, MatView<T> side, const Carry<T>& carry_out, const Tape& tape,
               const Context& context) const;
  void backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens,
                const Carry<const T>& carry_in, MatView<const T> dlogits, MatView<const T> dside,
                const Carry<T>& d_carry_out, MatView<T> dx, const Params<T>& grad,
                const Carry<T>& d_carry_in, const Context& context) const;

 private:
  Tape first_rows(const Tape& tape, Index count) const;
  template <class V>
  void check_state(const char* name, MatView<V> state, Index count) const {
    if (state.data != nullptr) require_shape(name, state, count, cell.state);
  }
};

template <class T>
class GruRouter : public HeadRouter<T, GruHead<T>, TopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index state = 128;  ///< width of the cell
    Index k = 2;        ///< 1 ... experts
    CellKind cell = CellKind::gru;
    bool cell_bias = true;
    bool bias = false;  ///< the logits have a bias
    bool renormalise = true;

    static constexpr std::string_view kind() noexcept { return "gru"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("state"), c.state...);
      f(Field::required("k"), c.k...);
      f(Field{"cell"}, c.cell...);
      f(Field{"cell_bias"}, c.cell_bias...);
      f(Field{"bias"}, c.bias...);
      f(Field{"renormalise"}, c.renormalise...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit GruRouter(const Config& config)
      : HeadRouter<T, GruHead<T>, TopKRule<T>>(
            {config.width,
             {config.state, config.state, config.cell, config.cell_bias},
             linear_head<T>("GruRouter", config.state, config.experts, config.bias).linear},
            {config.k, {Score::softmax, false, config.renormalise, T(0), T(1)}}),
        config_(config) {
    constexpr const char* kName = "GruRouter";
    require_count(kName, "width", config.width);
    require_k(kName, config.k, config.experts);
  }

  const Config& config() const noexcept { return config_; }
  /// Parameters of the cell that a stack of these routers shares.
  CellParams<T> make_cell(Workspace& memory) const { return this->head().cell.take_params(memory); }
  std::size_t cell_bytes() const noexcept {
    ByteCounter counter;
    this->head().cell.take_params(counter);
    return counter.bytes();
  }

 private:
  Config config_;
};

template <class T>
std::size_t GruHead<T>::params_bytes() const noexcept {
  ByteCounter counter;
  counter.take<T>(cell.state, input_width);
  return counter.bytes() + linear.params_bytes();
}

template <class T>
std::size_t GruHead<T>::prepared_bytes() const noexcept {
  ByteCounter counter;
  counter.take<T>(cell.state, input_width);
  return counter.bytes() + cell.prepared_bytes() + linear.prepared_bytes();
}

template <class T>
std::size_t GruHead<T>::scratch_bytes(Index max_tokens, int) const noexcept {
  ByteCounter counter;
  counter.take<T>(max_tokens, cell.state);
  counter.take<T>(max_tokens, cell.state);
  return counter.bytes() + cell.backward_bytes(max_tokens) +
         stages::project_backward_bytes(std::max(cell.state, linear.experts));
}

template <class T>
auto GruHead<T>::make_params(Workspace& memory) const -> Params<T> {
  Params<T> params{};
  params.projection = memory.template take<T>(cell.state, input_width);
  params.head = linear.make_params(memory);
  return params;
}

template <class T>
auto GruHead<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  check(params);
  Prepared prepared;
  prepared.projection =
      pack_panels(params.projection, memory.template take<T>(cell.state, input_width).data);
  prepared.cell = cell.prepare(params.cell, memory);
  prepared.head = linear.prepare(params.head, memory);
  return prepared;
}

template <class T>
void GruHead<T>::check(const Params<const T>& params) const {
  require_shape("projection", params.projection, cell.state, input_width);
  linear.check(params.head);
  cell.check(params.cell);
}

template <class T>
void GruHead<T>::check_gradient(const Params<T>& grad) const {
  if (grad.projection.data != nullptr) {
    require_shape("grad.projection", grad.projection, cell.state, input_width);
  }
  linear.check_gradient(grad.head);
  cell.check_gradient(grad.cell);
}

template <class T>
auto GruHead<T>::first_rows(const Tape& tape, Index count) const -> Tape {
  return {tape.projected.row_block(0, count),
          {tape.cell.gates.row_block(0, count), tape.cell.recurrent.row_block(0, count),
           tape.cell.state.row_block(0, count)}};
}

template <class T>
void GruHead<T>::forward(const Prepared& prepared, const Tokens<T>& tokens,
                         const Carry<const T>& carry_in, MatView<T> logits, MatView<T>,
                         const Carry<T>& carry_out, const Tape& tape,
                         const Context& context) const {
  const Index count = tokens.count();
  check_state("carry_in.state", carry_in.state, count);
  check_state("carry_out.state", carry_out.state, count);
  if (count == 0) return;
  const Tape rows = first_rows(tape, count);
  dense::forward<T>(prepared.projection, {}, tokens.x, rows.projected, context);
  cell.forward(prepared.cell, rows.projected, carry_in.state, rows.cell, context);
  stages::project<T>(prepared.head, rows.cell.state, logits, context);
  for (Index t = 0; carry_out.state.data != nullptr && t < count; ++t) {
    std::copy_n(rows.cell.state.row(t).begin(), cell.state, carry_out.state.row(t).begin());
  }
}

template <class T>
void GruHead<T>::backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens,
                          const Carry<const T>& carry_in, MatView<const T> dlogits,
                          MatView<const T>, const Carry<T>& d_carry_out, MatView<T> dx,
                          const Params<T>& grad, const Carry<T>& d_carry_in,
                          const Context& context) const {
  const Index count = tokens.count();
  check_state("carry_in.state", carry_in.state, count);
  check_state("d_carry_out.state", d_carry_out.state, count);
  check_state("d_carry_in.state", d_carry_in.state, count);
  if (count == 0) return;
  const Workspace::Frame frame(context.scratch);
  const Tape rows = first_rows(saved, count);
  const MatView<T> d_state = context.scratch.template take<T>(count, cell.state);
  const MatView<T> d_projected = context.scratch.template take<T>(count, cell.state);
  for (Index t = 0; t < count; ++t) {
    std::fill_n(d_projected.row(t).begin(), cell.state, T(0));
    for (Index i = 0; i < cell.state; ++i) {
      d_state(t, i) = d_carry_out.state.data != nullptr ? d_carry_out.state(t, i) : T(0);
    }
  }
  stages::project_backward<T>(params.head, rows.cell.state, dlogits, d_state, grad.head, context);
  cell.backward(params.cell, rows.cell, rows.projected, carry_in.state, d_state, d_projected,
                d_carry_in.state, grad.cell, context);
  stages::project_backward<T>({params.projection, {}}, tokens.x, d_projected, dx,
                              {grad.projection, {}}, context);
}

#ifndef MOLE_HEADER_ONLY
extern template struct GruHead<float>;
extern template struct GruHead<double>;
extern template class HeadRouter<float, GruHead<float>, TopKRule<float>>;
extern template class HeadRouter<double, GruHead<double>, TopKRule<double>>;
#endif

static_assert(Router<GruRouter<float>>);
static_assert(Router<GruRouter<double>>);

}  // namespace mole::inline MOLE_ABI

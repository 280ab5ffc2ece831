// SPDX-License-Identifier: Apache-2.0
// A router that remembers over depth: the layers of a stack share one recurrent cell, whose state
// goes from layer to layer (Qiu et al., "Layerwise Recurrent Router for Mixture-of-Experts", 2024).
//
//   x'_l = P_l x      h_l = GRU(x'_l, h_{l-1})      gates = top-k router of h_l
//   r = σ(W_ir x' + b_ir + W_hr h + b_hr)      z = σ(W_iz x' + b_iz + W_hz h + b_hz)
//   n = tanh(W_in x' + b_in + r ∘ (W_hn h + b_hn))      h' = (1 - z) ∘ n + z ∘ h
//
// x [tokens, width]   P [state, width]   h [tokens, state], h_0 = 0 where the carry is empty
#pragma once

#include <algorithm>
#include <cmath>

#include "mole/kernels/dense.hpp"
#include "mole/kernels/math.hpp"
#include "mole/routers/top_k.hpp"

namespace skeleton {

using mole::Index;
using mole::MatView;
using mole::None;

/// Blocks of rows in the order reset, update, candidate.
template <class V>
struct GruCell {
  MatView<V> input_weight, hidden_weight;  ///< [3 state, state]
  MatView<V> input_bias, hidden_bias;      ///< [1, 3 state]

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(mole::Leaf{"input_weight"}, p.input_weight...);
    f(mole::Leaf{"hidden_weight"}, p.hidden_weight...);
    f(mole::Leaf{"input_bias"}, p.input_bias...);
    f(mole::Leaf{"hidden_bias"}, p.hidden_bias...);
  }
  operator GruCell<const V>() const noexcept requires(!std::is_const_v<V>) {
    return {input_weight, hidden_weight, input_bias, hidden_bias};
  }
};

template <class T>
class GruRouter {
 public:
  struct Config {
    Index width = 0, state = 0, experts = 0, k = 2;
  };

  /// `cell` looks at what the stack owns, so `visit` does not name it: as weights all layers look
  /// at the same memory, as gradients all add into the same memory.
  template <class V>
  struct Params {
    MatView<V> projection;  ///< P [state, width]
    mole::LinearParams<V> head;
    GruCell<V> cell;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(mole::Leaf{"projection"}, p.projection...);
      mole::visit_group<mole::LinearParams<V>>(mole::Leaf{"head"}, f, p.head...);
    }
    operator Params<const V>() const noexcept requires(!std::is_const_v<V>) {
      return {projection, head, cell};
    }
  };

  struct Prepared {
    mole::Panels<T> projection, input_weight, hidden_weight;
    GruCell<const T> cell;  ///< the caller's; only its biases are read
    mole::LinearPrepared<T> head;
  };

  template <class V>
  struct Carry {
    MatView<V> state;  ///< [tokens, state], or empty

    operator Carry<const V>() const noexcept requires(!std::is_const_v<V>) { return {state}; }
  };

  struct Tape : mole::RouterTape<T> {
    MatView<T> projected;  ///< [tokens, state], x'
    MatView<T> gates;      ///< [tokens, 3 state], r, z, n
    MatView<T> recurrent;  ///< [tokens, 3 state], W_h h + b_h
    MatView<T> state;      ///< [tokens, state], h'
  };

  using Scalar = T;
  using Buffers = None;
  static constexpr mole::Scope scope = mole::Scope::token;
  static constexpr mole::GradientKind gradient = mole::GradientKind::exact;

  explicit GruRouter(const Config& config)
      : config_(config), head_({.width = config.state, .experts = config.experts, .k = config.k}) {}

  Index input_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return config_.experts; }
  Index max_per_token() const noexcept { return head_.max_per_token(); }

  std::size_t prepared_bytes() const noexcept {
    mole::ByteCounter counter;
    counter.take<T>(config_.state, config_.width);
    counter.take<T>(3 * config_.state, config_.state);
    counter.take<T>(3 * config_.state, config_.state);
    return counter.bytes() + head_.prepared_bytes();
  }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept {
    mole::ByteCounter counter;
    counter.take<T>(8 * max_tokens, config_.state);
    counter.take<T>(3, config_.state);
    return counter.bytes() + 6 * mole::kAlignment + head_.scratch_bytes(max_tokens, workers) +
           mole::stages::project_backward_bytes(3 * config_.state);
  }
  std::size_t tape_bytes(Index max_tokens) const noexcept {
    mole::ByteCounter counter;
    take_cell(counter, max_tokens);
    return counter.bytes() + head_.tape_bytes(max_tokens);
  }
  Tape make_tape(mole::Workspace& memory, Index max_tokens) const {
    Tape tape = take_cell(memory, max_tokens);
    static_cast<mole::RouterTape<T>&>(tape) = head_.make_tape(memory, max_tokens);
    return tape;
  }

  Prepared prepare(const Params<const T>& params, mole::Workspace& memory) const {
    const auto pack = [&](const char* name, MatView<const T> weight, Index rows, Index cols) {
      mole::require_shape(name, weight, rows, cols);
      return mole::pack_panels(weight, memory.take<T>(rows * cols).data());
    };
    const Index state = config_.state;
    mole::require_shape("cell.input_bias", params.cell.input_bias, 1, 3 * state);
    mole::require_shape("cell.hidden_bias", params.cell.hidden_bias, 1, 3 * state);
    return {pack("projection", params.projection, state, config_.width),
            pack("cell.input_weight", params.cell.input_weight, 3 * state, state),
            pack("cell.hidden_weight", params.cell.hidden_weight, 3 * state, state), params.cell,
            head_.prepare(params.head, memory)};
  }

  void forward(const Prepared& prepared, None, const mole::Tokens<T>& tokens,
               const mole::Overrides<T>& overrides, const Carry<const T>& carry_in,
               mole::RoutingTable<T>& table, const Carry<T>& carry_out, Tape* tape,
               const mole::Context& context) const {
    const Index count = tokens.count();
    mole::require_shape("x", tokens.x, count, config_.width);
    check_state("carry_in.state", carry_in.state, count);
    check_state("carry_out.state", carry_out.state, count);
    const mole::Workspace::Frame frame(context.scratch);
    const Tape cell =
        tape != nullptr ? first_rows(*tape, count) : take_cell(context.scratch, count);
    mole::dense::forward<T>(prepared.projection, {}, tokens.x, cell.projected, context);
    mole::dense::forward<T>(prepared.input_weight, prepared.cell.input_bias, cell.projected,
                            cell.gates, context);
    if (carry_in.state.data != nullptr) {
      mole::dense::forward<T>(prepared.hidden_weight, prepared.cell.hidden_bias, carry_in.state,
                              cell.recurrent, context);
    } else {
      for (Index t = 0; t < count; ++t) {
        std::ranges::copy(prepared.cell.hidden_bias.row(0), cell.recurrent.row(t).begin());
      }
    }
    for (Index t = 0; t < count; ++t) step(t, carry_in, cell);
    head_.forward(prepared.head, {}, mole::Tokens<T>{cell.state}, overrides, None{}, table, None{},
                  tape, context);
    if (carry_out.state.data == nullptr) return;
    for (Index t = 0; t < count; ++t) {
      std::ranges::copy(cell.state.row(t), carry_out.state.row(t).begin());
    }
  }

  void backward(const Params<const T>& params, None, const Tape& saved,
                const mole::Tokens<T>& tokens, const mole::Overrides<T>& overrides,
                const Carry<const T>& carry_in, const mole::Routing<T>& routing, const Tape& d_tape,
                const Carry<T>& d_carry_out, MatView<T> dx, const Params<T>& grad,
                const Carry<T>& d_carry_in, const mole::Context& context) const {
    const Index count = tokens.count(), state = config_.state;
    const mole::Workspace::Frame frame(context.scratch);
    const Tape cell = first_rows(saved, count);
    const MatView<T> d_state = zeros(context, count, state);
    const MatView<T> d_projected = zeros(context, count, state);
    const MatView<T> d_gates = zeros(context, count, 3 * state);
    const MatView<T> d_recurrent = zeros(context, count, 3 * state);
    head_.backward(params.head, {}, saved, mole::Tokens<T>{cell.state}, overrides, None{}, routing,
                   d_tape, None{}, d_state, grad.head, None{}, context);
    for (Index t = 0; t < count; ++t) {
      for (Index i = 0; d_carry_out.state.data != nullptr && i < state; ++i) {
        d_state(t, i) += d_carry_out.state(t, i);
      }
      step_backward(t, carry_in, cell, d_state, d_gates, d_recurrent, d_carry_in);
    }
    linear_backward(params.cell.input_weight, cell.projected, d_gates, d_projected,
                    {grad.cell.input_weight, grad.cell.input_bias}, context);
    linear_backward(params.projection, tokens.x, d_projected, dx, {grad.projection, {}}, context);
    mole::LinearParams<T> d_hidden{grad.cell.hidden_weight, grad.cell.hidden_bias};
    if (carry_in.state.data == nullptr) d_hidden.weight = {};
    linear_backward(params.cell.hidden_weight, carry_in.state, d_recurrent, d_carry_in.state,
                    d_hidden, context);
  }

 private:
  template <class Arena>
  Tape take_cell(Arena& arena, Index tokens) const {
    Tape tape;
    tape.projected = arena.template take<T>(tokens, config_.state);
    tape.gates = arena.template take<T>(tokens, 3 * config_.state);
    tape.recurrent = arena.template take<T>(tokens, 3 * config_.state);
    tape.state = arena.template take<T>(tokens, config_.state);
    return tape;
  }
  static Tape first_rows(const Tape& tape, Index count) {
    mole::require(count <= tape.state.rows, mole::Errc::limit_exceeded, "tape: made for ",
                  tape.state.rows, " tokens, got ", count);
    Tape rows = tape;
    for (MatView<T>* view : {&rows.projected, &rows.gates, &rows.recurrent, &rows.state}) {
      *view = view->row_block(0, count);
    }
    return rows;
  }
  /// A token whose dy is 0 adds nothing, whatever its x holds.
  static void linear_backward(MatView<const T> weight, MatView<const T> x, MatView<const T> dy,
                              MatView<T> dx, const mole::LinearParams<T>& grad,
                              const mole::Context& context) {
    mole::stages::project_backward<T>({weight, {}}, x, dy, dx, grad, context);
  }
  template <class V>
  void check_state(const char* name, MatView<V> state, Index count) const {
    if (state.data != nullptr) mole::require_shape(name, state, count, config_.state);
  }
  static MatView<T> zeros(const mole::Context& context, Index rows, Index cols) {
    const MatView<T> view = context.scratch.template take<T>(rows, cols);
    std::fill_n(view.data, view.size(), T(0));
    return view;
  }

  /// cell.gates holds W_i x' + b_i and becomes r, z, n.
  void step(Index t, const Carry<const T>& carry_in, const Tape& cell) const noexcept {
    const Index p = config_.state;
    for (Index i = 0; i < p; ++i) {
      const T before = carry_in.state.data != nullptr ? carry_in.state(t, i) : T(0);
      T &r = cell.gates(t, i), &z = cell.gates(t, p + i), &n = cell.gates(t, 2 * p + i);
      r = mole::math::sigmoid<T>(r + cell.recurrent(t, i));
      z = mole::math::sigmoid<T>(z + cell.recurrent(t, p + i));
      n = mole::math::tanh<T>(std::fma(r, cell.recurrent(t, 2 * p + i), n));
      cell.state(t, i) = std::fma(z, before - n, n);
    }
  }

  void step_backward(Index t, const Carry<const T>& carry_in, const Tape& cell, MatView<T> d_state,
                     MatView<T> d_gates, MatView<T> d_recurrent,
                     const Carry<T>& d_carry_in) const noexcept {
    const Index p = config_.state;
    if (std::ranges::all_of(d_state.row(t), [](T d) { return d == T(0); })) return;
    for (Index i = 0; i < p; ++i) {
      const T before = carry_in.state.data != nullptr ? carry_in.state(t, i) : T(0);
      const T r = cell.gates(t, i), z = cell.gates(t, p + i), n = cell.gates(t, 2 * p + i);
      const T dh = d_state(t, i);
      const T dn = dh * (T(1) - z) * std::fma(-n, n, T(1));
      const T dr = dn * cell.recurrent(t, 2 * p + i) * r * (T(1) - r);
      const T dz = dh * (before - n) * z * (T(1) - z);
      d_gates(t, i) = d_recurrent(t, i) = dr;
      d_gates(t, p + i) = d_recurrent(t, p + i) = dz;
      d_gates(t, 2 * p + i) = dn;
      d_recurrent(t, 2 * p + i) = dn * r;
      T* const d_before = d_carry_in.state.data != nullptr ? &d_carry_in.state(t, i) : nullptr;
      if (d_before != nullptr) *d_before = std::fma(dh, z, *d_before);
    }
  }

  Config config_;
  mole::TopKRouter<T> head_;
};

static_assert(mole::Router<GruRouter<float>>);
static_assert(mole::Router<GruRouter<double>>);

}  // namespace skeleton

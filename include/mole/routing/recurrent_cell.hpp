// SPDX-License-Identifier: Apache-2.0
// The recurrent cell that the layers of a stack share.
//
//   gru   r = σ(W_ir x + b_ir + W_hr h + b_hr)      z = σ(W_iz x + b_iz + W_hz h + b_hz)
//         n = tanh(W_in x + b_in + r ∘ (W_hn h + b_hn))      h' = (1 - z) ∘ n + z ∘ h
//   rnn   h' = tanh(W_in x + b_in + W_hn h + b_hn)
//
// Shapes: x [tokens, input], h [tokens, state], or empty for zeros. The weights are stacked in the
// order r, z, n (PyTorch's), or only n: W_i [3 state, input], W_h [3 state, state], b [1, 3 state],
// both biases empty where the cell has none.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/params.hpp"
#include "mole/core/workspace.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/kernels/math.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/routing/project.hpp"

namespace mole::inline MOLE_ABI {

enum class CellKind { gru, rnn };
constexpr std::array<std::string_view, 2> enum_names(CellKind) noexcept {
  return {"gru", "rnn"};
}

template <class V>
struct CellParams {
  MatView<V> input_weight, hidden_weight;
  MatView<V> input_bias = {}, hidden_bias = {};

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"input_weight"}, p.input_weight...);
    f(Leaf{"hidden_weight"}, p.hidden_weight...);
    f(Leaf{"input_bias"}, p.input_bias...);
    f(Leaf{"hidden_bias"}, p.hidden_bias...);
  }
  operator CellParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {input_weight, hidden_weight, input_bias, hidden_bias};
  }
};

template <class T>
struct CellPrepared {
  Panels<T> input_weight, hidden_weight;
  MatView<const T> input_bias, hidden_bias;
};

/// What backward needs of forward.
template <class T>
struct CellTape {
  MatView<T> gates;      ///< [tokens, blocks · state], r, z, n
  MatView<T> recurrent;  ///< [tokens, blocks · state], W_h h + b_h
  MatView<T> state;      ///< [tokens, state], h'
};

/// The shape of a cell, and what follows from it.
template <class T>
struct RecurrentCell {
  Index input = 0, state = 0;
  CellKind kind = CellKind::gru;
  bool bias = true;

  Index rows() const noexcept { return (kind == CellKind::gru ? 3 : 1) * state; }

  template <class Arena>
  CellParams<T> take_params(Arena& arena) const {
    CellParams<T> params;
    params.input_weight = arena.template take<T>(rows(), input);
    params.hidden_weight = arena.template take<T>(rows(), state);
    if (!bias) return params;
    params.input_bias = arena.template take<T>(1, rows());
    params.hidden_bias = arena.template take<T>(1, rows());
    return params;
  }
  template <class Arena>
  CellTape<T> take_tape(Arena& arena, Index tokens) const {
    CellTape<T> tape;
    tape.gates = arena.template take<T>(tokens, rows());
    tape.recurrent = arena.template take<T>(tokens, rows());
    tape.state = arena.template take<T>(tokens, state);
    return tape;
  }
  std::size_t prepared_bytes() const noexcept;
  std::size_t backward_bytes(Index tokens) const noexcept;

  /// Throws shape_mismatch, naming the member.
  void check(const CellParams<const T>& params) const;
  /// The same for gradients, any of which may be absent.
  void check_gradient(const CellParams<T>& grad) const;
  /// A packed copy. Throws what `check` throws.
  CellPrepared<T> prepare(const CellParams<const T>& params, Workspace& memory) const;

  /// Fills the tape of these tokens; the next state is tape.state.
  void forward(const CellPrepared<T>& prepared, MatView<const T> x, MatView<const T> before,
               const CellTape<T>& tape, const Context& context) const;
  /// Adds into dx, d_before and the gradients that have memory. `d_state` [tokens, state].
  void backward(const CellParams<const T>& params, const CellTape<T>& tape, MatView<const T> x,
                MatView<const T> before, MatView<const T> d_state, MatView<T> dx,
                MatView<T> d_before, const CellParams<T>& grad, const Context& context) const;

 private:
  void step(Index t, MatView<const T> before, const CellTape<T>& tape) const noexcept;
  void step_backward(Index t, MatView<const T> before, const CellTape<T>& tape,
                     MatView<const T> d_state, MatView<T> d_gates, MatView<T> d_recurrent,
                     MatView<T> d_before) const noexcept;
};

template <class T>
std::size_t RecurrentCell<T>::prepared_bytes() const noexcept {
  ByteCounter counter;
  take_params(counter);
  return counter.bytes();
}

template <class T>
std::size_t RecurrentCell<T>::backward_bytes(Index tokens) const noexcept {
  ByteCounter counter;
  counter.take<T>(tokens, rows());
  counter.take<T>(tokens, rows());
  return counter.bytes() + stages::project_backward_bytes(rows());
}

template <class T>
void RecurrentCell<T>::check(const CellParams<const T>& params) const {
  require_shape("cell.input_weight", params.input_weight, rows(), input);
  require_shape("cell.hidden_weight", params.hidden_weight, rows(), state);
  require_shape("cell.input_bias", params.input_bias, bias ? 1 : 0, bias ? rows() : 0);
  require_shape("cell.hidden_bias", params.hidden_bias, bias ? 1 : 0, bias ? rows() : 0);
}

template <class T>
void RecurrentCell<T>::check_gradient(const CellParams<T>& grad) const {
  const auto fits = [](const char* name, MatView<T> view, Index height, Index width) {
    if (view.data != nullptr) require_shape(name, view, height, width);
  };
  fits("grad.cell.input_weight", grad.input_weight, rows(), input);
  fits("grad.cell.hidden_weight", grad.hidden_weight, rows(), state);
  fits("grad.cell.input_bias", grad.input_bias, bias ? 1 : 0, bias ? rows() : 0);
  fits("grad.cell.hidden_bias", grad.hidden_bias, bias ? 1 : 0, bias ? rows() : 0);
}

template <class T>
CellPrepared<T> RecurrentCell<T>::prepare(const CellParams<const T>& params,
                                          Workspace& memory) const {
  check(params);
  return {rows::pack(params.input_weight, memory), rows::pack(params.hidden_weight, memory),
          rows::clone(params.input_bias, memory), rows::clone(params.hidden_bias, memory)};
}

template <class T>
void RecurrentCell<T>::forward(const CellPrepared<T>& prepared, MatView<const T> x,
                               MatView<const T> before, const CellTape<T>& tape,
                               const Context& context) const {
  if (x.rows == 0) return;
  dense::forward<T>(prepared.input_weight, prepared.input_bias, x, tape.gates, context);
  if (before.data != nullptr) {
    dense::forward<T>(prepared.hidden_weight, prepared.hidden_bias, before, tape.recurrent,
                      context);
  }
  for (Index t = 0; t < x.rows; ++t) {
    if (before.data == nullptr) {
      for (Index i = 0; i < rows(); ++i) {
        tape.recurrent(t, i) = bias ? prepared.hidden_bias(0, i) : T(0);
      }
    }
    step(t, before, tape);
  }
}

template <class T>
void RecurrentCell<T>::step(Index t, MatView<const T> before,
                            const CellTape<T>& tape) const noexcept {
  for (Index i = 0; i < state; ++i) {
    if (kind == CellKind::rnn) {
      T& n = tape.gates(t, i);
      tape.state(t, i) = n = math::tanh<T>(n + tape.recurrent(t, i));
      continue;
    }
    const T h = before.data != nullptr ? before(t, i) : T(0);
    T &r = tape.gates(t, i), &z = tape.gates(t, state + i), &n = tape.gates(t, 2 * state + i);
    r = math::sigmoid<T>(r + tape.recurrent(t, i));
    z = math::sigmoid<T>(z + tape.recurrent(t, state + i));
    n = math::tanh<T>(std::fma(r, tape.recurrent(t, 2 * state + i), n));
    tape.state(t, i) = std::fma(z, h - n, n);
  }
}

template <class T>
void RecurrentCell<T>::backward(const CellParams<const T>& params, const CellTape<T>& tape,
                                MatView<const T> x, MatView<const T> before,
                                MatView<const T> d_state, MatView<T> dx, MatView<T> d_before,
                                const CellParams<T>& grad, const Context& context) const {
  const Index count = x.rows;
  const Workspace::Frame frame(context.scratch);
  const MatView<T> d_gates = context.scratch.template take<T>(count, rows());
  const MatView<T> d_recurrent = context.scratch.template take<T>(count, rows());
  std::fill_n(d_gates.data, d_gates.size(), T(0));
  std::fill_n(d_recurrent.data, d_recurrent.size(), T(0));
  for (Index t = 0; t < count; ++t) {
    step_backward(t, before, tape, d_state, d_gates, d_recurrent, d_before);
  }
  stages::project_backward<T>({params.input_weight, {}}, x, d_gates, dx,
                              {grad.input_weight, grad.input_bias}, context);
  const bool first = before.data == nullptr;
  stages::project_backward<T>({params.hidden_weight, {}}, before, d_recurrent, d_before,
                              {first ? MatView<T>() : grad.hidden_weight, grad.hidden_bias},
                              context);
}

template <class T>
void RecurrentCell<T>::step_backward(Index t, MatView<const T> before, const CellTape<T>& tape,
                                     MatView<const T> d_state, MatView<T> d_gates,
                                     MatView<T> d_recurrent, MatView<T> d_before) const noexcept {
  if (stages::is_zero<T>(d_state.row(t))) return;
  for (Index i = 0; i < state; ++i) {
    const T dh = d_state(t, i);
    if (kind == CellKind::rnn) {
      const T n = tape.gates(t, i);
      d_gates(t, i) = d_recurrent(t, i) = dh * std::fma(-n, n, T(1));
      continue;
    }
    const T h = before.data != nullptr ? before(t, i) : T(0);
    const T r = tape.gates(t, i), z = tape.gates(t, state + i), n = tape.gates(t, 2 * state + i);
    const T dn = dh * (T(1) - z) * std::fma(-n, n, T(1));
    d_gates(t, i) = d_recurrent(t, i) = dn * tape.recurrent(t, 2 * state + i) * r * (T(1) - r);
    d_gates(t, state + i) = d_recurrent(t, state + i) = dh * (h - n) * z * (T(1) - z);
    d_gates(t, 2 * state + i) = dn;
    d_recurrent(t, 2 * state + i) = dn * r;
    if (d_before.data != nullptr) d_before(t, i) = std::fma(dh, z, d_before(t, i));
  }
}

#ifndef MOLE_HEADER_ONLY
extern template struct RecurrentCell<float>;
extern template struct RecurrentCell<double>;
#endif

}  // namespace mole::inline MOLE_ABI

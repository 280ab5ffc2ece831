// SPDX-License-Identifier: Apache-2.0
// Mixture: a router and a bank of experts.
//
//   y_t += Σ_e gate(t, e) · f_e(x_t ∘ dropout_t)      gates from the router, experts from the bank
//
// The result is added to y, so a host writes its own linear map first and needs no copy.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/layers/layer_checks.hpp"
#include "mole/layers/layer_input.hpp"
#include "mole/routing/router.hpp"

namespace mole::inline MOLE_ABI {

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
class Mixture {
 public:
  using Scalar = typename R::Scalar;
  using T = Scalar;
  using Buffers = typename R::Buffers;
  template <class V>
  using Carry = typename R::template Carry<V>;
  using RouterTape = typename R::Tape;
  using ExpertTape = typename B::Tape;
  static constexpr bool needs_base = B::needs_base;

  /// Weights, gradients or moments: router.*, experts.*.
  template <class V>
  struct Params {
    typename R::template Params<V> router;
    typename B::template Params<V> experts;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      const Leaf router{"router"}, experts{"experts"};
      visit_group<typename R::template Params<V>>(router, f, p.router...);
      visit_group<typename B::template Params<V>>(experts, f, p.experts...);
    }
  };

  struct Weights {
    typename R::template Params<const T> router;
    typename B::Weights experts;

    /// The names of `Params`.
    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      const Leaf router{"router"}, experts{"experts"};
      visit_group<typename R::template Params<const T>>(router, f, p.router...);
      visit_group<typename B::Weights>(experts, f, p.experts...);
    }
  };

  struct Prepared {
    typename R::Prepared router;
    typename B::Prepared experts;
  };

  struct Tape {
    typename R::Tape router;
    typename B::Tape experts;
    RoutingTable<T> routing;
  };

  /// Throws shape_mismatch when router and bank have different numbers of experts.
  Mixture(R router, B experts);

  const R& router() const noexcept { return router_; }
  const B& experts() const noexcept { return experts_; }
  Index input_width() const noexcept { return experts_.input_width(); }
  Index output_width() const noexcept { return experts_.output_width(); }
  Index max_slots(Index max_tokens) const noexcept {
    return saturating_product(max_tokens, router_.max_per_token());
  }

  std::size_t prepared_bytes() const noexcept;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;

  Prepared prepare(const Weights& weights, Workspace& memory) const;
  Tape make_tape(Workspace& memory, Index max_tokens) const;
  RoutingTable<T> make_table(Workspace& memory, Index max_tokens) const;

  /// First half of forward: fills the table.
  void route(const Prepared& prepared, const Buffers& buffers, const LayerInput<T>& input,
             const Carry<const T>& carry_in, RoutingTable<T>& table, const Carry<T>& carry_out,
             typename R::Tape* tape, const Context& context) const;

  /// Second half: adds the experts' part for a finished routing.
  void apply(const Prepared& prepared, const LayerInput<T>& input, const Routing<T>& routing,
             MatView<T> y, typename B::Tape* tape, const Context& context) const;

  /// What `apply` checks before it writes: throws shape_mismatch, invalid_argument if y overlaps x,
  /// or out_of_memory if the scratch is too small for the experts.
  void check_apply(const LayerInput<T>& input, const Routing<T>& routing, MatView<T> y,
                   const Context& context) const;

  /// Both halves. `tape` null is inference.
  void forward(const Prepared& prepared, const Buffers& buffers, const LayerInput<T>& input,
               const Carry<const T>& carry_in, MatView<T> y, const Carry<T>& carry_out, Tape* tape,
               const Context& context) const;

  /// Both halves for a router without carry, with empty buffers.
  void forward(const Prepared& prepared, const LayerInput<T>& input, MatView<T> y, Tape* tape,
               const Context& context) const requires std::same_as<Carry<T>, None> {
    forward(prepared, Buffers{}, input, {}, y, {}, tape, context);
  }

  /// `d_tape` holds the gradients that losses added (zero where there are none); the bank adds its
  /// gate gradients, then the router reads it. Adds into d_input and grad.
  void backward(const Weights& weights, const Buffers& buffers, const Tape& saved,
                const LayerInput<T>& input, const Carry<const T>& carry_in, MatView<const T> dy,
                const typename R::Tape& d_tape, const Carry<T>& d_carry_out,
                const LayerInputGradient<T>& d_input, const Params<T>& grad,
                const Carry<T>& d_carry_in, const Context& context) const;

  void backward(const Weights& weights, const Tape& saved, const LayerInput<T>& input,
                MatView<const T> dy, const typename R::Tape& d_tape,
                const LayerInputGradient<T>& d_input, const Params<T>& grad,
                const Context& context) const requires std::same_as<Carry<T>, None> {
    backward(weights, Buffers{}, saved, input, {}, dy, d_tape, {}, d_input, grad, {}, context);
  }

  /// What `backward` checks before it adds anything: throws shape_mismatch, invalid_argument, or
  /// out_of_memory if the scratch is too small.
  void check_backward(const Weights& weights, const Tape& saved, const LayerInput<T>& input,
                      MatView<const T> dy, const typename R::Tape& d_tape,
                      const LayerInputGradient<T>& d_input, const Params<T>& grad,
                      const Context& context) const;

 private:
  static MatView<T> router_gradient(const LayerInput<T>& input,
                                    const LayerInputGradient<T>& d_input) noexcept {
    return input.router_x.data != nullptr ? d_input.router_x : d_input.x;
  }
  /// x ∘ dropout in scratch, or x itself.
  MatView<const T> expert_input(const LayerInput<T>& input, const Context& context) const;

  R router_;
  B experts_;
};

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar> Mixture<R, B>::Mixture(R router,
                                                                                     B experts)
    : router_(std::move(router)), experts_(std::move(experts)) {
  require(router_.experts() == experts_.experts(), Errc::shape_mismatch, "Mixture: the router has ",
          router_.experts(), " experts, the bank has ", experts_.experts());
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar> std::size_t
Mixture<R, B>::prepared_bytes()
const noexcept {
  return router_.prepared_bytes() + experts_.prepared_bytes();
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar> std::size_t
Mixture<R, B>::scratch_bytes(Index max_tokens, int workers)
const noexcept {
  ByteCounter dropped;
  dropped.take<T>(saturating_product(2, max_tokens), input_width());
  return RoutingTable<T>::bytes(max_tokens, router_.experts(), router_.max_per_token()) +
         router_.scratch_bytes(max_tokens, workers) + dropped.bytes() +
         experts_.scratch_bytes(max_tokens, max_slots(max_tokens), workers);
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar> std::size_t Mixture<R, B>::tape_bytes(
    Index max_tokens)
const noexcept {
  return router_.tape_bytes(max_tokens) + experts_.tape_bytes(max_tokens, max_slots(max_tokens)) +
         RoutingTable<T>::bytes(max_tokens, router_.experts(), router_.max_per_token());
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
auto Mixture<R, B>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  return {router_.prepare(weights.router, memory), experts_.prepare(weights.experts, memory)};
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
auto Mixture<R, B>::make_table(Workspace& memory, Index max_tokens) const -> RoutingTable<T> {
  return RoutingTable<T>(memory, max_tokens, router_.experts(), router_.max_per_token());
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
auto Mixture<R, B>::make_tape(Workspace& memory, Index max_tokens) const -> Tape {
  return {router_.make_tape(memory, max_tokens),
          experts_.make_tape(memory, max_tokens, max_slots(max_tokens)),
          make_table(memory, max_tokens)};
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
auto Mixture<R, B>::expert_input(const LayerInput<T>& input, const Context& context) const
    -> MatView<const T> {
  if (input.dropout.data == nullptr) return input.x;
  const MatView<T> dropped = context.scratch.template take<T>(input.x.rows, input.x.cols);
  for (Index t = 0; t < dropped.rows; ++t) {
    for (Index i = 0; i < dropped.cols; ++i) dropped(t, i) = input.x(t, i) * input.dropout(t, i);
  }
  return dropped;
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
void Mixture<R, B>::route(const Prepared& prepared, const Buffers& buffers,
                          const LayerInput<T>& input, const Carry<const T>& carry_in,
                          RoutingTable<T>& table, const Carry<T>& carry_out, typename R::Tape* tape,
                          const Context& context) const {
  router_.forward(prepared.router, buffers, input.tokens(), input.overrides, carry_in, table,
                  carry_out, tape, context);
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
void Mixture<R, B>::check_apply(const LayerInput<T>& input, const Routing<T>& routing, MatView<T> y,
                                const Context& context) const {
  require(routing.experts == experts_.experts(), Errc::shape_mismatch, "routing: expected ",
          experts_.experts(), " experts, got ", routing.experts);
  require_shape("x", input.x, routing.tokens, input_width());
  require_shape("y", y, routing.tokens, output_width());
  require_apart("y", y, "x", input.x);
  const bool dropped = input.dropout.data != nullptr;
  if (dropped) require_shape("dropout", input.dropout, routing.tokens, input_width());
  ByteCounter dropped_bytes;
  dropped_bytes.take<T>(dropped ? routing.tokens : 0, input_width());
  const std::size_t needed =
      dropped_bytes.bytes() +
      experts_.scratch_bytes(routing.tokens, routing.slots(), context.workers);
  require(context.scratch.free_bytes() >= needed, Errc::out_of_memory, "scratch: ", needed,
          " bytes needed for ", routing.tokens, " tokens, ", context.scratch.free_bytes(),
          " are free");
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
void Mixture<R, B>::apply(const Prepared& prepared, const LayerInput<T>& input,
                          const Routing<T>& routing, MatView<T> y, typename B::Tape* tape,
                          const Context& context) const {
  check_apply(input, routing, y, context);
  Workspace::Frame frame(context.scratch);
  const BankInput<T> bank_input{.x = expert_input(input, context), .base = input.base};
  experts_.forward(prepared.experts, bank_input, routing, y, tape, context);
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
void Mixture<R, B>::forward(const Prepared& prepared, const Buffers& buffers,
                            const LayerInput<T>& input, const Carry<const T>& carry_in,
                            MatView<T> y, const Carry<T>& carry_out, Tape* tape,
                            const Context& context) const {
  Workspace::Frame frame(context.scratch);
  RoutingTable<T> scratch_table;
  if (tape == nullptr) scratch_table = make_table(context.scratch, input.x.rows);
  RoutingTable<T>& table = tape != nullptr ? tape->routing : scratch_table;
  route(prepared, buffers, input, carry_in, table, carry_out,
        tape != nullptr ? &tape->router : nullptr, context);
  apply(prepared, input, table.view(), y, tape != nullptr ? &tape->experts : nullptr, context);
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
void Mixture<R, B>::check_backward(const Weights& weights, const Tape& saved,
                                   const LayerInput<T>& input, MatView<const T> dy,
                                   const typename R::Tape& d_tape,
                                   const LayerInputGradient<T>& d_input, const Params<T>& grad,
                                   const Context& context) const {
  const Routing<T> routing = saved.routing.view();
  const bool dropped = input.dropout.data != nullptr;
  require_shape("x", input.x, routing.tokens, input_width());
  if (dropped) require_shape("dropout", input.dropout, routing.tokens, input_width());
  require_shape("dy", dy, routing.tokens, output_width());
  if (d_input.x.data != nullptr) require_shape("dx", d_input.x, routing.tokens, input_width());
  require_apart("dx", d_input.x, "x", input.x);
  require_apart("dx", d_input.x, "dy", dy);
  if constexpr (requires { &R::require_backward; }) {
    router_.require_backward(weights.router, saved.router, input.tokens(), routing, d_tape,
                             router_gradient(input, d_input), grad.router);
  }
  ByteCounter dropped_bytes;
  dropped_bytes.take<T>(dropped ? saturating_product(2, routing.tokens) : 0, input_width());
  const std::size_t part = std::max<std::size_t>(
      router_.scratch_bytes(routing.tokens, context.workers),
      experts_.scratch_bytes(routing.tokens, routing.slots(), context.workers));
  require_scratch(context, dropped_bytes.bytes() + bank_params_bytes(experts_) + part);
  require_bank_params(experts_, weights.experts, grad.experts, context);
}

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
void Mixture<R, B>::backward(const Weights& weights, const Buffers& buffers, const Tape& saved,
                             const LayerInput<T>& input, const Carry<const T>& carry_in,
                             MatView<const T> dy, const typename R::Tape& d_tape,
                             const Carry<T>& d_carry_out, const LayerInputGradient<T>& d_input,
                             const Params<T>& grad, const Carry<T>& d_carry_in,
                             const Context& context) const {
  Workspace::Frame frame(context.scratch);
  check_backward(weights, saved, input, dy, d_tape, d_input, grad, context);
  const Routing<T> routing = saved.routing.view();
  const BankInput<T> bank_input{.x = expert_input(input, context), .base = input.base};
  BankInputGradient<T> d_bank{.x = d_input.x, .base = d_input.base};
  const bool dropped = input.dropout.data != nullptr && d_input.x.data != nullptr;
  if (dropped) {
    d_bank.x = context.scratch.template take<T>(input.x.rows, input.x.cols);
    for (Index t = 0; t < d_bank.x.rows; ++t) std::ranges::fill(d_bank.x.row(t), T(0));
  }
  experts_.backward(weights.experts, saved.experts, bank_input, routing, dy, d_tape.gate.row(0),
                    d_bank, grad.experts, context);
  for (Index t = 0; dropped && t < d_bank.x.rows; ++t) {
    for (Index i = 0; i < d_bank.x.cols; ++i) {
      d_input.x(t, i) = std::fma(d_bank.x(t, i), input.dropout(t, i), d_input.x(t, i));
    }
  }
  router_.backward(weights.router, buffers, saved.router, input.tokens(), input.overrides, carry_in,
                   routing, d_tape, d_carry_out, router_gradient(input, d_input), grad.router,
                   d_carry_in, context);
}

}  // namespace mole::inline MOLE_ABI

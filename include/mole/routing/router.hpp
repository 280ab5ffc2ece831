// SPDX-License-Identifier: Apache-2.0
// The Router concept: decides which experts work on which token, and how much.
//
//   forward   tokens -> Routing          backward   d gates (+ d scores from losses) -> d x, d
//   params
//
// Every requirement is explained in docs/router_contract.md and tested by
// tests/contracts/router_contract.hpp. A router is a value with const methods: all that changes is
// an argument. Argument order: parameters, buffers, saved, inputs, incoming gradients, outputs,
// context.
#pragma once

#include <concepts>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/params.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"
#include "mole/routing/routing.hpp"
#include "mole/routing/tokens.hpp"

namespace mole::inline MOLE_ABI {

/// What one decision may depend on.
enum class Scope {
  token,     ///< the token alone
  sequence,  ///< the token's sequence
  batch,     ///< every token of the call
};

/// What `backward` computes.
enum class GradientKind {
  exact,             ///< the derivative of forward away from the borders of the selection
  straight_through,  ///< a documented stand-in
  none,              ///< no gradient
};

/// What backward needs of forward, and what losses read. Its gradient has the same type: losses add
/// into `logits` and `prob`, banks into `gate`; `backward` then reads all three and leaves the
/// whole gradient of the logits in `logits`.
template <class T>
struct RouterTape {
  MatView<T> logits;  ///< [tokens, experts], after the overrides; -inf where not available
  MatView<T> prob;    ///< [tokens, experts], the scores over all experts
  MatView<T> gate;    ///< [1, max slots], gates in slot order

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"logits"}, p.logits...);
    f(Leaf{"prob"}, p.prob...);
    f(Leaf{"gate"}, p.gate...);
  }
};

/// The parameters of a router without any.
template <class V>
struct NoParams {
  template <class F, class... P>
  static void visit(F&&, P&...) {}
  operator NoParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {};
  }
};

// clang-format off
template <class R>
concept Router =
    requires {
      typename R::Scalar;
      typename R::Config;
      typename R::template Params<typename R::Scalar>;
      typename R::template Params<const typename R::Scalar>;
      typename R::Prepared;
      typename R::Buffers;
      typename R::template Carry<typename R::Scalar>;
      typename R::template Carry<const typename R::Scalar>;
      typename R::Tape;
      { R::scope } -> std::convertible_to<Scope>;
      { R::gradient } -> std::convertible_to<GradientKind>;
    } &&
    std::derived_from<typename R::Tape, RouterTape<typename R::Scalar>> &&
    std::convertible_to<typename R::template Params<typename R::Scalar>,
                        typename R::template Params<const typename R::Scalar>> &&
    requires(const R r, const typename R::template Params<const typename R::Scalar> params,
             const typename R::Prepared prepared, const typename R::Buffers buffers,
             const typename R::Tape saved, const Tokens<typename R::Scalar> tokens,
             const Overrides<typename R::Scalar> overrides,
             const typename R::template Carry<const typename R::Scalar> carry_in,
             const typename R::template Carry<typename R::Scalar> carry_out,
             const typename R::template Params<typename R::Scalar> grad,
             const Routing<typename R::Scalar> routing, RoutingTable<typename R::Scalar>& table,
             typename R::Tape* tape, const typename R::Tape d_tape,
             const MatView<typename R::Scalar> dx, Workspace& memory, const Context& context,
             Index n) {
      { r.input_width() } noexcept -> std::convertible_to<Index>;
      { r.experts() } noexcept -> std::convertible_to<Index>;
      { r.max_per_token() } noexcept -> std::convertible_to<Index>;
      { r.prepared_bytes() } noexcept -> std::convertible_to<std::size_t>;
      { r.scratch_bytes(n, int{}) } noexcept -> std::convertible_to<std::size_t>;
      { r.tape_bytes(n) } noexcept -> std::convertible_to<std::size_t>;
      { r.prepare(params, memory) } -> std::same_as<typename R::Prepared>;
      { r.make_tape(memory, n) } -> std::same_as<typename R::Tape>;
      r.forward(prepared, buffers, tokens, overrides, carry_in, table, carry_out, tape, context);
      r.backward(params, buffers, saved, tokens, overrides, carry_in, routing, d_tape, carry_out, dx,
                 grad, carry_out, context);
    };
// clang-format on

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// Heads: how tokens become logits. The first half of a HeadRouter (head_router.hpp).
//
//   LinearHead      l = x Wᵀ + b
//   LinearPairHead  l = x Wᵀ + b      side = x Vᵀ + c     further columns for the rule to read
//   NoHead          l = 0             for rules that decide without scores
//
// A head declares Params, Prepared, Tape and Carry as a Router does, `scope`, and the number of
// `side` columns. `forward` fills logits and side; `backward` adds into dx, the parameter gradients
// and the carry's gradient.
#pragma once

#include <algorithm>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/params.hpp"
#include "mole/routing/field_checks.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/stages.hpp"

namespace mole::inline MOLE_ABI {

/// What the tape of a head without one holds.
struct NoHeadTape {};

template <class T>
struct LinearHead {
  Linear<T> linear;

  template <class V>
  using Params = LinearParams<V>;
  using Prepared = LinearPrepared<T>;
  using Tape = NoHeadTape;
  template <class V>
  using Carry = None;
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return linear.width; }
  Index experts() const noexcept { return linear.experts; }
  Index side() const noexcept { return 0; }

  std::size_t params_bytes() const noexcept { return linear.params_bytes(); }
  std::size_t prepared_bytes() const noexcept { return linear.prepared_bytes(); }
  std::size_t scratch_bytes(Index, int) const noexcept {
    return stages::project_backward_bytes(linear.experts);
  }
  Params<T> make_params(Workspace& memory) const { return linear.make_params(memory); }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const {
    return linear.prepare(params, memory);
  }
  template <class Arena>
  Tape take_tape(Arena&, Index) const {
    return {};
  }
  void check(const Params<const T>& params) const { linear.check(params); }
  void check_gradient(const Params<T>& grad) const { linear.check_gradient(grad); }

  void forward(const Prepared& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T>, None, const Tape&, const Context& context) const {
    stages::project<T>(prepared, tokens.x, logits, context);
  }
  void backward(const Params<const T>& params, const Tape&, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T>, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const {
    stages::project_backward<T>(params, tokens.x, dlogits, dx, grad, context);
  }
};

/// The head of a router with linear logits. Throws invalid_argument, naming the field.
template <class T>
LinearHead<T> linear_head(const char* router, Index width, Index experts, bool bias) {
  require_count(router, "width", width);
  require_count(router, "experts", experts);
  return {{width, experts, bias}};
}

/// Parameters of a LinearPairHead. The group of the second map has the rule's word for it.
template <class V>
struct LinearPairParams {
  LinearParams<V> router, side;

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    visit_group<LinearParams<V>>(Leaf{"router"}, f, p.router...);
    visit_group<LinearParams<V>>(Leaf{"side"}, f, p.side...);
  }
  operator LinearPairParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {router, side};
  }
};

template <class T>
struct LinearPairHead {
  Linear<T> router, second;

  template <class V>
  using Params = LinearPairParams<V>;
  struct Prepared {
    LinearPrepared<T> router, side;
  };
  using Tape = NoHeadTape;
  template <class V>
  using Carry = None;
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return router.width; }
  Index experts() const noexcept { return router.experts; }
  Index side() const noexcept { return second.experts; }

  std::size_t params_bytes() const noexcept {
    return router.params_bytes() + second.params_bytes();
  }
  std::size_t prepared_bytes() const noexcept {
    return router.prepared_bytes() + second.prepared_bytes();
  }
  std::size_t scratch_bytes(Index, int) const noexcept {
    return stages::project_backward_bytes(std::max(router.experts, second.experts));
  }
  Params<T> make_params(Workspace& memory) const {
    Params<T> params;
    params.router = router.make_params(memory);
    params.side = second.make_params(memory);
    return params;
  }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const {
    check(params);
    Prepared prepared;
    prepared.router = router.prepare(params.router, memory);
    prepared.side = second.prepare(params.side, memory);
    return prepared;
  }
  template <class Arena>
  Tape take_tape(Arena&, Index) const {
    return {};
  }
  void check(const Params<const T>& params) const {
    router.check(params.router);
    second.check(params.side);
  }
  void check_gradient(const Params<T>& grad) const {
    router.check_gradient(grad.router);
    second.check_gradient(grad.side);
  }

  void forward(const Prepared& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T> side, None, const Tape&, const Context& context) const {
    stages::project<T>(prepared.router, tokens.x, logits, context);
    stages::project<T>(prepared.side, tokens.x, side, context);
  }
  void backward(const Params<const T>& params, const Tape&, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T> dside, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const {
    stages::project_backward<T>(params.router, tokens.x, dlogits, dx, grad.router, context);
    stages::project_backward<T>(params.side, tokens.x, dside, dx, grad.side, context);
  }
};

template <class T>
struct NoHead {
  Index input_width = 0;  ///< of x, which is not read
  Index count = 0;        ///< of experts

  template <class V>
  using Params = NoParams<V>;
  using Prepared = None;
  using Tape = NoHeadTape;
  template <class V>
  using Carry = None;
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return input_width; }
  Index experts() const noexcept { return count; }
  Index side() const noexcept { return 0; }

  std::size_t params_bytes() const noexcept { return 0; }
  std::size_t prepared_bytes() const noexcept { return 0; }
  std::size_t scratch_bytes(Index, int) const noexcept { return 0; }
  Params<T> make_params(Workspace&) const noexcept { return {}; }
  Prepared prepare(const Params<const T>&, Workspace&) const noexcept { return {}; }
  template <class Arena>
  Tape take_tape(Arena&, Index) const {
    return {};
  }
  void check(const Params<const T>&) const noexcept {}
  void check_gradient(const Params<T>&) const noexcept {}

  void forward(None, const Tokens<T>&, None, MatView<T> logits, MatView<T>, None, const Tape&,
               const Context&) const noexcept {
    for (Index t = 0; t < logits.rows; ++t) {
      std::fill_n(logits.row(t).begin(), logits.cols, T(0));
    }
  }
  void backward(const Params<const T>&, const Tape&, const Tokens<T>&, None, MatView<const T>,
                MatView<const T>, None, MatView<T>, const Params<T>&, None,
                const Context&) const noexcept {}
};

/// The head of a router without logits. Throws invalid_argument, naming the field.
template <class T>
NoHead<T> no_head(const char* router, Index width, Index experts) {
  linear_head<T>(router, width, experts, false);  // which asks for the same sizes
  return {width, experts};
}

}  // namespace mole::inline MOLE_ABI

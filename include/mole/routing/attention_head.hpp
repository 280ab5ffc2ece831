// SPDX-License-Identifier: Apache-2.0
// AttentionHead: logits by attention among the experts, within each token.
//
//   q = x W_qᵀ + b_q     k = x W_kᵀ + b_k     v = x W_vᵀ + b_v
//   a_ij = softmax over j of (q_i k_j)        l_i = Σ_j a_ij v_j
//
// Shapes: x [tokens, width], W_q, W_k, W_v [experts, width], q, k, v, l [tokens, experts]. With one
// number per expert and token there is nothing to scale the products by. Work is experts² a token,
// memory is not: backward forms the rows of a again.
//
// A product that is NaN counts as -infinity, products of +infinity share their row and have no
// gradient. What has the share 0 is not touched. An expert whose products are all -infinity attends
// to none and is not available.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "mole/core/config.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/head.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct AttentionHeadParams {
  LinearParams<V> query, key, value;

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    visit_group<LinearParams<V>>(Leaf{"query"}, f, p.query...);
    visit_group<LinearParams<V>>(Leaf{"key"}, f, p.key...);
    visit_group<LinearParams<V>>(Leaf{"value"}, f, p.value...);
  }
  operator AttentionHeadParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {query, key, value};
  }
};

template <class T>
struct AttentionHead {
  Linear<T> linear;  ///< of each of the three maps

  template <class V>
  using Params = AttentionHeadParams<V>;
  struct Prepared {
    LinearPrepared<T> query, key, value;
  };
  struct Tape {
    MatView<T> query, key, value;  ///< [tokens, experts]
  };
  template <class V>
  using Carry = None;
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return linear.width; }
  Index experts() const noexcept { return linear.experts; }
  Index side() const noexcept { return 0; }

  std::size_t params_bytes() const noexcept { return 3 * linear.params_bytes(); }
  std::size_t prepared_bytes() const noexcept { return 3 * linear.prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  Params<T> make_params(Workspace& memory) const;
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index tokens) const {
    Tape tape;
    tape.query = arena.template take<T>(tokens, experts());
    tape.key = arena.template take<T>(tokens, experts());
    tape.value = arena.template take<T>(tokens, experts());
    return tape;
  }
  void check(const Params<const T>& params) const;
  void check_gradient(const Params<T>& grad) const;

  void forward(const Prepared& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T> side, None, const Tape& tape, const Context& context) const;
  void backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T> dside, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const;

 private:
  /// Fills `share` with the row of a of one expert; its logit.
  T attend(T query, std::span<const T> key, std::span<const T> value,
           std::span<T> share) const noexcept;
  /// Adds what arrives by the logits of token t into its rows of `d`.
  void attend_backward(Index t, const Tape& saved, std::span<const T> dlogits, const Tape& d,
                       std::span<T> share) const noexcept;
  static Tape first_rows(const Tape& tape, Index count) noexcept {
    return {tape.query.row_block(0, count), tape.key.row_block(0, count),
            tape.value.row_block(0, count)};
  }
};

template <class T>
std::size_t AttentionHead<T>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  ByteCounter counter;
  take_tape(counter, max_tokens);
  WorkerRows<T>(counter, workers, 1, experts());
  return counter.bytes() + stages::project_backward_bytes(experts());
}

template <class T>
auto AttentionHead<T>::make_params(Workspace& memory) const -> Params<T> {
  Params<T> params;
  params.query = linear.make_params(memory);
  params.key = linear.make_params(memory);
  params.value = linear.make_params(memory);
  return params;
}

template <class T>
auto AttentionHead<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  Prepared prepared;
  prepared.query = linear.prepare(params.query, memory);
  prepared.key = linear.prepare(params.key, memory);
  prepared.value = linear.prepare(params.value, memory);
  return prepared;
}

template <class T>
void AttentionHead<T>::check(const Params<const T>& params) const {
  linear.check(params.query);
  linear.check(params.key);
  linear.check(params.value);
}

template <class T>
void AttentionHead<T>::check_gradient(const Params<T>& grad) const {
  linear.check_gradient(grad.query);
  linear.check_gradient(grad.key);
  linear.check_gradient(grad.value);
}

template <class T>
T AttentionHead<T>::attend(T query, std::span<const T> key, std::span<const T> value,
                           std::span<T> share) const noexcept {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  for (std::size_t j = 0; j < key.size(); ++j) {
    const T product = query * key[j];
    share[j] = std::isnan(product) ? kNever : product;
  }
  stages::softmax<T>(share, share);
  T logit = T(0);
  bool attends = false;
  for (std::size_t j = 0; j < value.size(); ++j) {
    if (share[j] == T(0)) continue;
    attends = true;
    logit = std::fma(share[j], value[j], logit);
  }
  return attends ? logit : kNever;
}

template <class T>
void AttentionHead<T>::forward(const Prepared& prepared, const Tokens<T>& tokens, None,
                               MatView<T> logits, MatView<T>, None, const Tape& tape,
                               const Context& context) const {
  const Index count = tokens.count();
  const Tape rows = first_rows(tape, count);
  stages::project<T>(prepared.query, tokens.x, rows.query, context);
  stages::project<T>(prepared.key, tokens.x, rows.key, context);
  stages::project<T>(prepared.value, tokens.x, rows.value, context);
  const Workspace::Frame frame(context.scratch);
  const WorkerRows<T> shares(context.scratch, context.workers, 1, experts());
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    for (Index t = begin; t < end; ++t) {
      for (Index i = 0; i < experts(); ++i) {
        logits(t, i) =
            attend(rows.query(t, i), rows.key.row(t), rows.value.row(t), shares(worker, 0));
      }
    }
  });
}

template <class T>
void AttentionHead<T>::attend_backward(Index t, const Tape& saved, std::span<const T> dlogits,
                                       const Tape& d, std::span<T> share) const noexcept {
  const std::span<const T> key = saved.key.row(t), value = saved.value.row(t);
  for (Index i = 0; i < experts(); ++i) {
    const T query = saved.query(t, i), dlogit = dlogits[i];
    if (dlogit == T(0)) continue;
    const T logit = attend(query, key, value, share);
    for (Index j = 0; j < experts(); ++j) {
      if (share[j] == T(0)) continue;
      d.value(t, j) = std::fma(share[j], dlogit, d.value(t, j));
      if (!std::isfinite(query * key[j])) continue;
      const T dproduct = share[j] * dlogit * (value[j] - logit);
      d.query(t, i) = std::fma(dproduct, key[j], d.query(t, i));
      d.key(t, j) = std::fma(dproduct, query, d.key(t, j));
    }
  }
}

template <class T>
void AttentionHead<T>::backward(const Params<const T>& params, const Tape& saved,
                                const Tokens<T>& tokens, None, MatView<const T> dlogits,
                                MatView<const T>, None, MatView<T> dx, const Params<T>& grad, None,
                                const Context& context) const {
  const Index count = tokens.count();
  const Workspace::Frame frame(context.scratch);
  const Tape rows = first_rows(saved, count);
  const Tape d = take_tape(context.scratch, count);
  const WorkerRows<T> shares(context.scratch, context.workers, 1, experts());
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    for (Index t = begin; t < end; ++t) {
      for (const MatView<T>& view : {d.query, d.key, d.value}) {
        std::ranges::fill(view.row(t), T(0));
      }
      attend_backward(t, rows, dlogits.row(t), d, shares(worker, 0));
    }
  });
  stages::project_backward<T>(params.query, tokens.x, d.query, dx, grad.query, context);
  stages::project_backward<T>(params.key, tokens.x, d.key, dx, grad.key, context);
  stages::project_backward<T>(params.value, tokens.x, d.value, dx, grad.value, context);
}

#ifndef MOLE_HEADER_ONLY
extern template struct AttentionHead<float>;
extern template struct AttentionHead<double>;
#endif

}  // namespace mole::inline MOLE_ABI

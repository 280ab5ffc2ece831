// SPDX-License-Identifier: Apache-2.0
// PrototypeHead: how alike the token and the prototype of an expert are.
//
//   l_te = scale · cos(u_t, p_e) = scale · û_t · p̂_e     v̂ = v / max(‖v‖, 1e-12)
//   u = x, or u = x Qᵀ with a projection
//
// Shapes: x [tokens, width], Q [projection, width], p [prototypes, width of u]. The scale is a
// constant, or learned: a parameter [1, 1], the inverse of a temperature. With an unconditional
// expert, one more than there are prototypes, a token whose id (Tokens::ids) is `id` has that
// expert alone, with the logit 0; the others never have it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "mole/core/config.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/head.hpp"

namespace mole::inline MOLE_ABI {

/// Tokens that are not routed by likeness: they have the last expert.
struct Unconditional {
  bool expert = false;  ///< there is such an expert
  std::int32_t id = -1;

  template <class T>
  bool covers(const Tokens<T>& tokens, Index t) const noexcept {
    return expert && !tokens.ids.empty() && tokens.ids[t] == id;
  }
};

template <class V>
struct PrototypeParams {
  MatView<V> prototypes;       ///< [prototypes, width of u]
  MatView<V> projection = {};  ///< Q [projection, width], or empty: none
  MatView<V> scale = {};       ///< [1, 1], or empty: a constant

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"prototypes"}, p.prototypes...);
    f(Leaf{"projection"}, p.projection...);
    f(Leaf{"scale"}, p.scale...);
  }
  operator PrototypeParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {prototypes, projection, scale};
  }
};

template <class T>
struct PrototypeHead {
  Linear<T> prototypes;  ///< experts: as many as there are prototypes
  T scale = T(1);
  Unconditional unconditional = {};
  Linear<T> projection = {};  ///< experts: width of u; 0: none
  bool learned_scale = false;

  static constexpr double kSmallestNorm = 1e-12;

  template <class V>
  using Params = PrototypeParams<V>;
  struct Prepared {
    LinearPrepared<T> unit, projection;  ///< the prototypes over their norms
    T scale = T(1);
  };
  struct Tape {
    MatView<T> cosine;     ///< [tokens, prototypes]
    MatView<T> norm;       ///< [1, tokens], of u, not below kSmallestNorm
    MatView<T> projected;  ///< [tokens, width of u] with a projection
  };
  template <class V>
  using Carry = None;
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return projects() ? projection.width : prototypes.width; }
  bool projects() const noexcept { return projection.experts > 0; }
  Index experts() const noexcept { return prototypes.experts + (unconditional.expert ? 1 : 0); }
  Index side() const noexcept { return 0; }

  std::size_t params_bytes() const noexcept;
  std::size_t prepared_bytes() const noexcept { return params_bytes() + prototypes.params_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  Params<T> make_params(Workspace& memory) const;
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index tokens) const {
    return {arena.template take<T>(tokens, prototypes.experts), arena.template take<T>(1, tokens),
            arena.template take<T>(tokens, projection.experts)};
  }
  void check(const Params<const T>& params) const;
  void check_gradient(const Params<T>& grad) const;

  void forward(const Prepared& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T> side, None, const Tape& tape, const Context& context) const;
  void backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T> dside, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const;

 private:
  static T norm_of(std::span<const T> row) noexcept;
  /// Fills `unit` with the rows of the prototypes over their norms.
  void normalise(MatView<const T> rows, MatView<T> unit) const noexcept;
  MatView<const T> likened(const Tape& tape, const Tokens<T>& tokens) const noexcept {
    return projects() ? tape.projected.row_block(0, tokens.count()) : tokens.x;
  }
  /// share = factor · dlogits / norm; takes from du what a longer u would not change.
  void share_gradient(const Tape& saved, const Tokens<T>& tokens, T factor,
                      MatView<const T> dlogits, MatView<T> du, MatView<T> share,
                      const Context& context) const;
  /// Through the norms of the prototypes.
  void add_prototypes(const Params<const T>& params, MatView<const T> unit, MatView<const T> dunit,
                      MatView<T> dprototypes) const noexcept;
  void add_scale(const Tape& saved, MatView<const T> dlogits, MatView<T> dscale) const noexcept;
};

template <class T>
std::size_t PrototypeHead<T>::params_bytes() const noexcept {
  ByteCounter counter;
  counter.take<T>(learned_scale ? 1 : 0);
  return counter.bytes() + prototypes.params_bytes() + (projects() ? projection.params_bytes() : 0);
}

template <class T>
std::size_t PrototypeHead<T>::scratch_bytes(Index max_tokens, int) const noexcept {
  ByteCounter counter;
  counter.take<T>(max_tokens, prototypes.experts);
  counter.take<T>(max_tokens, projection.experts);
  counter.take<T>(prototypes.experts, prototypes.width);
  counter.take<T>(prototypes.experts, prototypes.width);
  return counter.bytes() +
         stages::project_backward_bytes(std::max(prototypes.experts, projection.experts));
}

template <class T>
auto PrototypeHead<T>::make_params(Workspace& memory) const -> Params<T> {
  Params<T> params;
  params.prototypes = prototypes.make_params(memory).weight;
  if (projects()) params.projection = projection.make_params(memory).weight;
  if (learned_scale) params.scale = memory.template take<T>(1, 1);
  return params;
}

template <class T>
void PrototypeHead<T>::check(const Params<const T>& params) const {
  require_shape("prototypes", params.prototypes, prototypes.experts, prototypes.width);
  require_shape("projection", params.projection, projection.experts, projection.width);
  require_shape("scale", params.scale, learned_scale ? 1 : 0, learned_scale ? 1 : 0);
}

template <class T>
void PrototypeHead<T>::check_gradient(const Params<T>& grad) const {
  if (grad.prototypes.data != nullptr) {
    require_shape("grad.prototypes", grad.prototypes, prototypes.experts, prototypes.width);
  }
  if (grad.projection.data != nullptr) {
    require_shape("grad.projection", grad.projection, projection.experts, projection.width);
  }
  if (grad.scale.data != nullptr) require_shape("grad.scale", grad.scale, 1, 1);
}

template <class T>
T PrototypeHead<T>::norm_of(std::span<const T> row) noexcept {
  double sum = 0;
  for (const T value : row) {
    const auto v = static_cast<double>(value);
    sum = std::fma(v, v, sum);
  }
  const double norm = std::sqrt(sum);
  return static_cast<T>(norm < kSmallestNorm ? kSmallestNorm : norm);
}

template <class T>
void PrototypeHead<T>::normalise(MatView<const T> rows, MatView<T> unit) const noexcept {
  for (Index e = 0; e < rows.rows; ++e) {
    const T norm = norm_of(rows.row(e));
    for (Index i = 0; i < rows.cols; ++i) unit(e, i) = rows(e, i) / norm;
  }
}

template <class T>
auto PrototypeHead<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  check(params);
  const MatView<T> unit = prototypes.make_params(memory).weight;
  normalise(params.prototypes, unit);
  Prepared prepared;
  prepared.unit = prototypes.prepare({unit, {}}, memory);
  if (projects()) prepared.projection = projection.prepare({params.projection, {}}, memory);
  prepared.scale = learned_scale ? params.scale(0, 0) : scale;
  return prepared;
}

template <class T>
void PrototypeHead<T>::forward(const Prepared& prepared, const Tokens<T>& tokens, None,
                               MatView<T> logits, MatView<T>, None, const Tape& tape,
                               const Context& context) const {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const Index count = tokens.count(), last = prototypes.experts;
  const MatView<T> cosine = tape.cosine.row_block(0, count);
  if (projects()) {
    stages::project<T>(prepared.projection, tokens.x, tape.projected.row_block(0, count), context);
  }
  const MatView<const T> u = likened(tape, tokens);
  stages::project<T>(prepared.unit, u, cosine, context);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      const bool apart = unconditional.covers(tokens, t);
      tape.norm(0, t) = norm_of(u.row(t));
      for (Index e = 0; e < last; ++e) {
        cosine(t, e) /= tape.norm(0, t);
        logits(t, e) = apart ? kNever : prepared.scale * cosine(t, e);
      }
      if (unconditional.expert) logits(t, last) = apart ? T(0) : kNever;
    }
  });
}

template <class T>
void PrototypeHead<T>::share_gradient(const Tape& saved, const Tokens<T>& tokens, T factor,
                                      MatView<const T> dlogits, MatView<T> du, MatView<T> share,
                                      const Context& context) const {
  const MatView<const T> u = likened(saved, tokens);
  parallel_for(context, share.rows, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      const T norm = saved.norm(0, t);
      T along = T(0);
      for (Index e = 0; e < share.cols; ++e) {
        const T d = dlogits(t, e) == T(0) ? T(0) : factor * dlogits(t, e);
        share(t, e) = d == T(0) ? T(0) : d / norm;
        if (d != T(0)) along = std::fma(d, saved.cosine(t, e), along);
      }
      if (du.data == nullptr || along == T(0) || !(norm > static_cast<T>(kSmallestNorm))) continue;
      const T shrink = -(along / norm) / norm;
      for (Index i = 0; i < du.cols; ++i) du(t, i) = std::fma(shrink, u(t, i), du(t, i));
    }
  });
}

template <class T>
void PrototypeHead<T>::add_prototypes(const Params<const T>& params, MatView<const T> unit,
                                      MatView<const T> dunit,
                                      MatView<T> dprototypes) const noexcept {
  for (Index e = 0; e < unit.rows; ++e) {
    if (stages::is_zero<T>(dunit.row(e))) continue;
    const T norm = norm_of(params.prototypes.row(e));
    T along = T(0);
    for (Index i = 0; i < unit.cols; ++i) along = std::fma(dunit(e, i), unit(e, i), along);
    if (!(norm > static_cast<T>(kSmallestNorm))) along = T(0);
    for (Index i = 0; i < unit.cols; ++i) {
      dprototypes(e, i) += std::fma(-along, unit(e, i), dunit(e, i)) / norm;
    }
  }
}

template <class T>
void PrototypeHead<T>::add_scale(const Tape& saved, MatView<const T> dlogits,
                                 MatView<T> dscale) const noexcept {
  double sum = 0;
  for (Index t = 0; t < dlogits.rows; ++t) {
    for (Index e = 0; e < prototypes.experts; ++e) {
      if (dlogits(t, e) == T(0)) continue;
      sum = std::fma(static_cast<double>(dlogits(t, e)), static_cast<double>(saved.cosine(t, e)),
                     sum);
    }
  }
  dscale(0, 0) += static_cast<T>(sum);
}

template <class T>
void PrototypeHead<T>::backward(const Params<const T>& params, const Tape& saved,
                                const Tokens<T>& tokens, None, MatView<const T> dlogits,
                                MatView<const T>, None, MatView<T> dx, const Params<T>& grad, None,
                                const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const Index count = prototypes.experts, inner = prototypes.width, rows = tokens.count();
  const MatView<T> share = context.scratch.template take<T>(rows, count);
  const MatView<T> unit = context.scratch.template take<T>(count, inner);
  const MatView<T> dunit = context.scratch.template take<T>(count, inner);
  MatView<T> du = dx;
  if (projects()) {
    du = context.scratch.template take<T>(rows, inner);
    std::fill_n(du.data, du.size(), T(0));
  }
  share_gradient(saved, tokens, learned_scale ? params.scale(0, 0) : scale, dlogits, du, share,
                 context);
  normalise(params.prototypes, unit);
  std::fill_n(dunit.data, dunit.size(), T(0));
  const bool trained = grad.prototypes.data != nullptr;
  stages::project_backward<T>({unit, {}}, likened(saved, tokens), share, du,
                              {trained ? dunit : MatView<T>(), {}}, context);
  if (trained) add_prototypes(params, unit, dunit, grad.prototypes);
  if (grad.scale.data != nullptr) add_scale(saved, dlogits, grad.scale);
  if (!projects()) return;
  stages::project_backward<T>({params.projection, {}}, tokens.x, du, dx, {grad.projection, {}},
                              context);
}

#ifndef MOLE_HEADER_ONLY
extern template struct PrototypeHead<float>;
extern template struct PrototypeHead<double>;
#endif

}  // namespace mole::inline MOLE_ABI

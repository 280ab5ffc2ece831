// SPDX-License-Identifier: Apache-2.0
// PrototypeHead: how alike the token and the prototype of an expert are.
//
//   l_te = scale · cos(x_t, p_e) = scale · x̂_t · p̂_e     v̂ = v / max(‖v‖, 1e-12)
//
// Shapes: x [tokens, width], p [prototypes, width]. With an unconditional expert, one more than
// there are prototypes, a token whose id (Tokens::ids) is `id` has that expert alone, with the
// logit 0; the others never have it.
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
  MatView<V> prototypes;  ///< [prototypes, width]

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"prototypes"}, p.prototypes...);
  }
  operator PrototypeParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {prototypes};
  }
};

template <class T>
struct PrototypeHead {
  Linear<T> prototypes;  ///< experts: as many as there are prototypes
  T scale = T(1);
  Unconditional unconditional;

  static constexpr double kSmallestNorm = 1e-12;

  template <class V>
  using Params = PrototypeParams<V>;
  using Prepared = LinearPrepared<T>;  ///< the prototypes over their norms
  struct Tape {
    MatView<T> cosine;  ///< [tokens, prototypes]
    MatView<T> norm;    ///< [1, tokens], not below kSmallestNorm
  };
  template <class V>
  using Carry = None;
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return prototypes.width; }
  Index experts() const noexcept { return prototypes.experts + (unconditional.expert ? 1 : 0); }
  Index side() const noexcept { return 0; }

  std::size_t params_bytes() const noexcept { return prototypes.params_bytes(); }
  std::size_t prepared_bytes() const noexcept { return 2 * prototypes.prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  Params<T> make_params(Workspace& memory) const { return {prototypes.make_params(memory).weight}; }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index tokens) const {
    return {arena.template take<T>(tokens, prototypes.experts), arena.template take<T>(1, tokens)};
  }
  void check(const Params<const T>& params) const { prototypes.check({params.prototypes, {}}); }
  void check_gradient(const Params<T>& grad) const {
    prototypes.check_gradient({grad.prototypes, {}});
  }

  void forward(const Prepared& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T> side, None, const Tape& tape, const Context& context) const;
  void backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T> dside, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const;

 private:
  static T norm_of(std::span<const T> row) noexcept;
  /// Fills `unit` with the rows of the prototypes over their norms.
  void normalise(MatView<const T> rows, MatView<T> unit) const noexcept;
  /// share = scale · dlogits / norm; takes from dx what a longer x would not change.
  void share_gradient(const Tape& saved, const Tokens<T>& tokens, MatView<const T> dlogits,
                      MatView<T> dx, MatView<T> share, const Context& context) const;
};

template <class T>
std::size_t PrototypeHead<T>::scratch_bytes(Index max_tokens, int) const noexcept {
  ByteCounter counter;
  counter.take<T>(max_tokens, prototypes.experts);
  counter.take<T>(prototypes.experts, prototypes.width);
  counter.take<T>(prototypes.experts, prototypes.width);
  return counter.bytes() + stages::project_backward_bytes(prototypes.experts);
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
  return prototypes.prepare({unit, {}}, memory);
}

template <class T>
void PrototypeHead<T>::forward(const Prepared& prepared, const Tokens<T>& tokens, None,
                               MatView<T> logits, MatView<T>, None, const Tape& tape,
                               const Context& context) const {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const Index count = tokens.count(), last = prototypes.experts;
  const MatView<T> cosine = tape.cosine.row_block(0, count);
  stages::project<T>(prepared, tokens.x, cosine, context);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      const bool apart = unconditional.covers(tokens, t);
      tape.norm(0, t) = norm_of(tokens.x.row(t));
      for (Index e = 0; e < last; ++e) {
        cosine(t, e) /= tape.norm(0, t);
        logits(t, e) = apart ? kNever : scale * cosine(t, e);
      }
      if (unconditional.expert) logits(t, last) = apart ? T(0) : kNever;
    }
  });
}

template <class T>
void PrototypeHead<T>::share_gradient(const Tape& saved, const Tokens<T>& tokens,
                                      MatView<const T> dlogits, MatView<T> dx, MatView<T> share,
                                      const Context& context) const {
  parallel_for(context, share.rows, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      const T norm = saved.norm(0, t);
      T along = T(0);
      for (Index e = 0; e < share.cols; ++e) {
        const T d = unconditional.covers(tokens, t) ? T(0) : scale * dlogits(t, e);
        share(t, e) = d == T(0) ? T(0) : d / norm;
        if (d != T(0)) along = std::fma(d, saved.cosine(t, e), along);
      }
      if (dx.data == nullptr || along == T(0) || !(norm > static_cast<T>(kSmallestNorm))) continue;
      const T factor = -(along / norm) / norm;
      for (Index i = 0; i < dx.cols; ++i) dx(t, i) = std::fma(factor, tokens.x(t, i), dx(t, i));
    }
  });
}

template <class T>
void PrototypeHead<T>::backward(const Params<const T>& params, const Tape& saved,
                                const Tokens<T>& tokens, None, MatView<const T> dlogits,
                                MatView<const T>, None, MatView<T> dx, const Params<T>& grad, None,
                                const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const Index count = prototypes.experts, width = prototypes.width;
  const MatView<T> share = context.scratch.template take<T>(tokens.count(), count);
  const MatView<T> unit = context.scratch.template take<T>(count, width);
  const MatView<T> dunit = context.scratch.template take<T>(count, width);
  share_gradient(saved, tokens, dlogits, dx, share, context);
  normalise(params.prototypes, unit);
  std::fill_n(dunit.data, dunit.size(), T(0));
  const bool trained = grad.prototypes.data != nullptr;
  stages::project_backward<T>({unit, {}}, tokens.x, share, dx, {trained ? dunit : MatView<T>(), {}},
                              context);
  for (Index e = 0; trained && e < count; ++e) {
    if (stages::is_zero<T>(dunit.row(e))) continue;
    const T norm = norm_of(params.prototypes.row(e));
    T along = T(0);
    for (Index i = 0; i < width; ++i) along = std::fma(dunit(e, i), unit(e, i), along);
    if (!(norm > static_cast<T>(kSmallestNorm))) along = T(0);
    for (Index i = 0; i < width; ++i) {
      grad.prototypes(e, i) += std::fma(-along, unit(e, i), dunit(e, i)) / norm;
    }
  }
}

#ifndef MOLE_HEADER_ONLY
extern template struct PrototypeHead<float>;
extern template struct PrototypeHead<double>;
#endif

}  // namespace mole::inline MOLE_ABI

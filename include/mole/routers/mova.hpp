// SPDX-License-Identifier: Apache-2.0
// MovaRouter: the fine-grained gate of MoVA behind a coarse choice of experts.
//
//   v = W₁ [context; mean_t x_t] + b₁      l = W₂ act(v) + b₂      for each sequence
//   S = the k largest l of the allowed experts, ties to the lower one      g = softmax of l over S
//
// Shapes: x [tokens, width], context [sequences, context width] (carry_in.context, empty without
// context; its gradient is added to d_carry_in.context), W₁ [hidden, context + width], W₂ [experts,
// hidden]. All tokens of a sequence share the decision. The coarse choice is
// overrides.forbidden: a masked expert has no slot, and a sequence whose experts are all masked has
// none at all, so that a mixture leaves its y bit for bit.
//
// Zong et al., "MoVA: Adapting Mixture of Vision Experts to Multimodal Context", NeurIPS 2024. Its
// block adds the mixture to x: write x to y first.
#pragma once

#include <algorithm>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/kernels/activation.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/pool.hpp"
#include "mole/routing/top_k_rule.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct MovaParams {
  LinearParams<V> inner;  ///< W₁ [hidden, context + width], b₁
  LinearParams<V> outer;  ///< W₂ [experts, hidden], b₂

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    visit_group<LinearParams<V>>(Leaf{"inner"}, f, p.inner...);
    visit_group<LinearParams<V>>(Leaf{"outer"}, f, p.outer...);
  }
  operator MovaParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {inner, outer};
  }
};

template <class T>
struct MovaHead {
  Linear<T> inner, outer;
  Index context_width = 0;
  Activation activation = Activation::gelu;

  template <class V>
  using Params = MovaParams<V>;
  struct Prepared {
    LinearPrepared<T> inner, outer;
  };
  /// Rows by sequence.
  struct Tape {
    MatView<T> input;   ///< [tokens, context + width]
    MatView<T> hidden;  ///< [tokens, hidden], before the activation
  };
  template <class V>
  struct Carry {
    MatView<V> context = {};  ///< [sequences, context width]

    operator Carry<const V>() const noexcept  // NOLINT(google-explicit-constructor)
        requires(!std::is_const_v<V>) {
      return {context};
    }
  };
  static constexpr Scope scope = Scope::sequence;

  Index width() const noexcept { return inner.width - context_width; }
  Index experts() const noexcept { return outer.experts; }
  Index side() const noexcept { return 0; }

  std::size_t params_bytes() const noexcept { return inner.params_bytes() + outer.params_bytes(); }
  std::size_t prepared_bytes() const noexcept {
    return inner.prepared_bytes() + outer.prepared_bytes();
  }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  Params<T> make_params(Workspace& memory) const {
    Params<T> params;
    params.inner = inner.make_params(memory);
    params.outer = outer.make_params(memory);
    return params;
  }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const {
    check(params);
    Prepared prepared;
    prepared.inner = inner.prepare(params.inner, memory);
    prepared.outer = outer.prepare(params.outer, memory);
    return prepared;
  }
  template <class Arena>
  Tape take_tape(Arena& arena, Index tokens) const {
    Tape tape;
    tape.input = arena.template take<T>(tokens, inner.width);
    tape.hidden = arena.template take<T>(tokens, inner.experts);
    return tape;
  }
  void check(const Params<const T>& params) const {
    inner.check(params.inner);
    outer.check(params.outer);
  }
  void check_gradient(const Params<T>& grad) const {
    inner.check_gradient(grad.inner);
    outer.check_gradient(grad.outer);
  }

  void forward(const Prepared& prepared, const Tokens<T>& tokens, const Carry<const T>& carry_in,
               MatView<T> logits, MatView<T> side, const Carry<T>& carry_out, const Tape& tape,
               const Context& context) const;
  void backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens,
                const Carry<const T>& carry_in, MatView<const T> dlogits, MatView<const T> dside,
                const Carry<T>& d_carry_out, MatView<T> dx, const Params<T>& grad,
                const Carry<T>& d_carry_in, const Context& context) const;

 private:
  /// One row a sequence, empty ones too.
  template <class V>
  void check_context(const char* name, MatView<V> context, const Tokens<T>& tokens,
                     bool needed) const {
    if (context_width == 0 || (!needed && context.data == nullptr)) return;
    const auto begins = static_cast<Index>(tokens.sequence_begin.size());
    require_shape(name, context, std::max<Index>(begins - 1, 1), context_width);
  }
  /// body(row, sequence) for the sequences with tokens.
  template <class Body>
  static void for_each_context(const Tokens<T>& tokens, Body body) {
    Index row = 0, sequence = 0;
    for_each_sequence(tokens, [&](Index begin, Index end) {
      if (end > begin) body(row++, sequence);
      ++sequence;
    });
  }
};

template <class T>
class MovaRouter : public HeadRouter<T, MovaHead<T>, TopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index context = 0;  ///< width of the context, 0: none
    Index hidden = 0;
    Index k = 2;  ///< 1 ... experts
    Activation activation = Activation::gelu;

    static constexpr std::string_view kind() noexcept { return "mova"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("context"), c.context...);
      f(Field::required("hidden"), c.hidden...);
      f(Field::required("k"), c.k...);
      f(Field{"activation"}, c.activation...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit MovaRouter(const Config& config)
      : HeadRouter<T, MovaHead<T>, TopKRule<T>>(
            {{config.context + config.width, config.hidden, true},
             linear_head<T>("MovaRouter", config.hidden, config.experts, true).linear,
             config.context,
             config.activation},
            {config.k, {Score::softmax, false, true, T(0), T(1)}}),
        config_(config) {
    constexpr const char* kName = "MovaRouter";
    require_count(kName, "width", config.width);
    require_field(config.context >= 0, kName, "context", "0 or more", config.context);
    require_k(kName, config.k, config.experts);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
std::size_t MovaHead<T>::scratch_bytes(Index max_tokens, int) const noexcept {
  ByteCounter counter;
  counter.take<T>(max_tokens, inner.width);
  for (int part = 0; part < 3; ++part) counter.take<T>(max_tokens, inner.experts);
  counter.take<T>(max_tokens, outer.experts);
  counter.take<std::int32_t>(max_tokens);
  return counter.bytes() + stages::project_backward_bytes(std::max(inner.experts, outer.experts));
}

template <class T>
void MovaHead<T>::forward(const Prepared& prepared, const Tokens<T>& tokens,
                          const Carry<const T>& carry_in, MatView<T> logits, MatView<T>,
                          const Carry<T>&, const Tape& tape, const Context& context) const {
  check_context("carry_in.context", carry_in.context, tokens, true);
  const Workspace::Frame frame(context.scratch);
  const Index count = tokens.count();
  const Index sequences =
      stages::pool<T>(Pool::mean, tokens, tape.input.col_block(context_width, width()));
  for_each_context(tokens, [&](Index row, Index sequence) {
    for (Index i = 0; i < context_width; ++i) tape.input(row, i) = carry_in.context(sequence, i);
  });
  const MatView<T> active = context.scratch.template take<T>(count, inner.experts);
  const MatView<T> of_sequence = context.scratch.template take<T>(count, outer.experts);
  const MatView<T> hidden = tape.hidden.row_block(0, sequences);
  stages::project<T>(prepared.inner, tape.input.row_block(0, sequences), hidden, context);
  gated::activate<T>(activation, rows::every(sequences, context.scratch), hidden, {}, active,
                     context);
  stages::project<T>(prepared.outer, active.row_block(0, sequences),
                     of_sequence.row_block(0, sequences), context);
  stages::spread<T>(tokens, of_sequence, logits);
}

template <class T>
void MovaHead<T>::backward(const Params<const T>& params, const Tape& saved,
                           const Tokens<T>& tokens, const Carry<const T>& carry_in,
                           MatView<const T> dlogits, MatView<const T>, const Carry<T>&,
                           MatView<T> dx, const Params<T>& grad, const Carry<T>& d_carry_in,
                           const Context& context) const {
  check_context("carry_in.context", carry_in.context, tokens, true);
  check_context("d_carry_in.context", d_carry_in.context, tokens, false);
  const Workspace::Frame frame(context.scratch);
  const auto take = [&](Index cols) {
    return context.scratch.template take<T>(tokens.count(), cols);
  };
  const MatView<T> d_sequence_all = take(outer.experts);
  const Index sequences = stages::for_each_filled(tokens, [](Index, Index, Index) {});
  const auto first = [&](MatView<T> rows) { return rows.row_block(0, sequences); };
  stages::spread_backward<T>(tokens, dlogits, d_sequence_all);
  const MatView<T> hidden = first(saved.hidden), input = first(saved.input);
  const MatView<T> active = first(take(inner.experts)), d_active = first(take(inner.experts));
  const MatView<T> d_hidden = first(take(inner.experts)), d_input = first(take(inner.width));
  const auto list = rows::every(sequences, context.scratch);
  gated::activate<T>(activation, list, hidden, {}, active, context);
  rows::fill(d_active, 0);
  rows::fill(d_input, 0);
  stages::project_backward<T>(params.outer, active, first(d_sequence_all), d_active, grad.outer,
                              context);
  gated::activate_backward<T>(activation, list, hidden, {}, d_active, d_hidden, {}, context);
  for (Index s = 0; s < sequences; ++s) {  // 0 times the slope of a NaN is no 0
    if (stages::is_zero<T>(d_sequence_all.row(s))) std::ranges::fill(d_hidden.row(s), T(0));
  }
  stages::project_backward<T>(params.inner, input, d_hidden, d_input, grad.inner, context);
  if (dx.data != nullptr) {
    stages::pool_backward<T>(Pool::mean, tokens, d_input.col_block(context_width, width()), dx);
  }
  for_each_context(tokens, [&](Index row, Index sequence) {
    for (Index i = 0; d_carry_in.context.data != nullptr && i < context_width; ++i) {
      d_carry_in.context(sequence, i) += d_input(row, i);
    }
  });
}

#ifndef MOLE_HEADER_ONLY
extern template struct MovaHead<float>;
extern template struct MovaHead<double>;
extern template class HeadRouter<float, MovaHead<float>, TopKRule<float>>;
extern template class HeadRouter<double, MovaHead<double>, TopKRule<double>>;
#endif

static_assert(Router<MovaRouter<float>>);
static_assert(Router<MovaRouter<double>>);

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// MlpHead: logits by two or three linear maps, with an activation between them.
//
//   h1 = act(x W1ᵀ + b1)     h2 = act(h1 W2ᵀ + b2), if there is a second one     l = h Wᵀ + b
//
// Shapes: x [tokens, width], W1 [hidden, width], W2 [hidden2, hidden], W [experts, last hidden].
// With the identity as activation and one hidden map it is a low-rank head. The derivative of relu
// at 0 is 0. What is not finite in h stays so and makes logits that are not available.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/kernels/math.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/head.hpp"

namespace mole::inline MOLE_ABI {

enum class HeadActivation { identity, relu, tanh };
constexpr std::array<std::string_view, 3> enum_names(HeadActivation) noexcept {
  return {"identity", "relu", "tanh"};
}

template <class V>
struct MlpHeadParams {
  LinearParams<V> hidden, hidden2, output;  ///< hidden2 is empty without a second hidden map

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    visit_group<LinearParams<V>>(Leaf{"hidden"}, f, p.hidden...);
    visit_group<LinearParams<V>>(Leaf{"hidden2"}, f, p.hidden2...);
    visit_group<LinearParams<V>>(Leaf{"output"}, f, p.output...);
  }
  operator MlpHeadParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {hidden, hidden2, output};
  }
};

template <class T>
struct MlpHead {
  Linear<T> hidden, hidden2, output;  ///< hidden2 with experts 0: none
  HeadActivation activation = HeadActivation::relu;

  template <class V>
  using Params = MlpHeadParams<V>;
  struct Prepared {
    LinearPrepared<T> hidden, hidden2, output;
  };
  struct Tape {
    MatView<T> hidden, hidden2;  ///< [tokens, .], after the activation
  };
  template <class V>
  using Carry = None;
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return hidden.width; }
  Index experts() const noexcept { return output.experts; }
  Index side() const noexcept { return 0; }
  bool is_deep() const noexcept { return hidden2.experts > 0; }

  std::size_t params_bytes() const noexcept;
  std::size_t prepared_bytes() const noexcept { return params_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  Params<T> make_params(Workspace& memory) const;
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index tokens) const {
    return {arena.template take<T>(tokens, hidden.experts),
            arena.template take<T>(tokens, hidden2.experts)};
  }
  void check(const Params<const T>& params) const;
  void check_gradient(const Params<T>& grad) const;

  void forward(const Prepared& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T> side, None, const Tape& tape, const Context& context) const;
  void backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T> dside, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const;

 private:
  void activate(MatView<T> rows, const Context& context) const;
  /// drows <- drows · act'(rows), rows being what the activation gave.
  void activate_backward(MatView<const T> rows, MatView<T> drows, const Context& context) const;
  Tape first_rows(const Tape& tape, Index count) const noexcept {
    return {tape.hidden.row_block(0, count),
            is_deep() ? tape.hidden2.row_block(0, count) : tape.hidden2};
  }
};

/// The head of a router with `hidden` and `hidden2` (0: none) inner columns. Throws
/// invalid_argument, naming the field.
template <class T>
MlpHead<T> mlp_head(const char* router, Index width, Index experts, Index hidden, Index hidden2,
                    HeadActivation activation, bool bias) {
  require_count(router, "hidden", hidden);
  require_field(hidden2 >= 0, router, "hidden2", "at least 0", hidden2);
  MlpHead<T> head;
  head.hidden = linear_head<T>(router, width, hidden, bias).linear;
  head.hidden2 = {hidden2 > 0 ? hidden : 0, hidden2, hidden2 > 0 && bias};
  head.output = linear_head<T>(router, hidden2 > 0 ? hidden2 : hidden, experts, bias).linear;
  head.activation = activation;
  return head;
}

template <class T>
std::size_t MlpHead<T>::params_bytes() const noexcept {
  return hidden.params_bytes() + (is_deep() ? hidden2.params_bytes() : 0) + output.params_bytes();
}

template <class T>
std::size_t MlpHead<T>::scratch_bytes(Index max_tokens, int) const noexcept {
  ByteCounter counter;
  counter.take<T>(max_tokens, hidden.experts);
  counter.take<T>(max_tokens, hidden2.experts);
  const Index widest = std::max({hidden.experts, hidden2.experts, output.experts});
  return counter.bytes() + stages::project_backward_bytes(widest);
}

template <class T>
auto MlpHead<T>::make_params(Workspace& memory) const -> Params<T> {
  Params<T> params;
  params.hidden = hidden.make_params(memory);
  if (is_deep()) params.hidden2 = hidden2.make_params(memory);
  params.output = output.make_params(memory);
  return params;
}

template <class T>
auto MlpHead<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  check(params);
  Prepared prepared;
  prepared.hidden = hidden.prepare(params.hidden, memory);
  if (is_deep()) prepared.hidden2 = hidden2.prepare(params.hidden2, memory);
  prepared.output = output.prepare(params.output, memory);
  return prepared;
}

template <class T>
void MlpHead<T>::check(const Params<const T>& params) const {
  hidden.check(params.hidden);
  if (is_deep()) hidden2.check(params.hidden2);
  output.check(params.output);
}

template <class T>
void MlpHead<T>::check_gradient(const Params<T>& grad) const {
  hidden.check_gradient(grad.hidden);
  if (is_deep()) hidden2.check_gradient(grad.hidden2);
  output.check_gradient(grad.output);
}

template <class T>
void MlpHead<T>::activate(MatView<T> rows, const Context& context) const {
  if (activation == HeadActivation::identity) return;
  parallel_for(context, rows.rows, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      for (T& v : rows.row(t)) {
        v = activation == HeadActivation::tanh ? math::tanh<T>(v) : v < T(0) ? T(0) : v;
      }
    }
  });
}

template <class T>
void MlpHead<T>::activate_backward(MatView<const T> rows, MatView<T> drows,
                                   const Context& context) const {
  if (activation == HeadActivation::identity) return;
  parallel_for(context, rows.rows, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      for (Index i = 0; i < rows.cols; ++i) {
        const T v = rows(t, i);
        if (activation == HeadActivation::relu) {
          if (!(v > T(0))) drows(t, i) = T(0);
        } else if (drows(t, i) != T(0)) {
          drows(t, i) *= std::fma(-v, v, T(1));
        }
      }
    }
  });
}

template <class T>
void MlpHead<T>::forward(const Prepared& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
                         MatView<T>, None, const Tape& tape, const Context& context) const {
  const Tape rows = first_rows(tape, tokens.count());
  stages::project<T>(prepared.hidden, tokens.x, rows.hidden, context);
  activate(rows.hidden, context);
  if (is_deep()) {
    stages::project<T>(prepared.hidden2, rows.hidden, rows.hidden2, context);
    activate(rows.hidden2, context);
  }
  stages::project<T>(prepared.output, is_deep() ? rows.hidden2 : rows.hidden, logits, context);
}

template <class T>
void MlpHead<T>::backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens,
                          None, MatView<const T> dlogits, MatView<const T>, None, MatView<T> dx,
                          const Params<T>& grad, None, const Context& context) const {
  const Index count = tokens.count();
  const Workspace::Frame frame(context.scratch);
  const Tape rows = first_rows(saved, count);
  const Tape d = take_tape(context.scratch, count);
  std::fill_n(d.hidden.data, d.hidden.size(), T(0));
  std::fill_n(d.hidden2.data, d.hidden2.size(), T(0));
  if (is_deep()) {
    stages::project_backward<T>(params.output, rows.hidden2, dlogits, d.hidden2, grad.output,
                                context);
    activate_backward(rows.hidden2, d.hidden2, context);
    stages::project_backward<T>(params.hidden2, rows.hidden, d.hidden2, d.hidden, grad.hidden2,
                                context);
  } else {
    stages::project_backward<T>(params.output, rows.hidden, dlogits, d.hidden, grad.output,
                                context);
  }
  activate_backward(rows.hidden, d.hidden, context);
  stages::project_backward<T>(params.hidden, tokens.x, d.hidden, dx, grad.hidden, context);
}

#ifndef MOLE_HEADER_ONLY
extern template struct MlpHead<float>;
extern template struct MlpHead<double>;
#endif

}  // namespace mole::inline MOLE_ABI

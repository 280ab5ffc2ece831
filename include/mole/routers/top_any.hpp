// SPDX-License-Identifier: Apache-2.0
// TopAnyRouter: every expert decides by a threshold of its own whether it works, so a token has as
// many experts as want it.
//
//   l = scale · cos(x, p_e) (+ overrides)     S = the experts with l_e > θ_e, if there is none the
//   largest l, ties to the lower expert     g = 1 / |S| on S, or 1     prob = σ(l)
//
// Shapes: x [tokens, width], prototypes p [experts, width], θ [1, experts]. The gradient of a gate
// goes straight through the step, as if it were σ(l_e) - σ(θ_e), over |S|: a stand-in. That of prob
// is exact.
//
// Guo et al., "Dynamic Mixture of Experts: An Auto-Tuning Approach for Efficient Transformer
// Models", 2024 (DynMoE). Its losses on the prototypes: losses/prototype_spread.hpp.
#pragma once

#include <cmath>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/prototype_head.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct TopAnyParams {
  PrototypeParams<V> likeness;
  MatView<V> threshold;  ///< θ [1, experts]

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    PrototypeParams<V>::visit(f, p.likeness...);
    f(Leaf{"threshold"}, p.threshold...);
  }
  operator TopAnyParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {likeness, threshold};
  }
};

/// A PrototypeHead whose further columns are the thresholds, the same for every token.
template <class T>
struct TopAnyHead {
  PrototypeHead<T> likeness;

  template <class V>
  using Params = TopAnyParams<V>;
  struct Prepared {
    typename PrototypeHead<T>::Prepared likeness;
    MatView<const T> threshold;
  };
  using Tape = typename PrototypeHead<T>::Tape;
  template <class V>
  using Carry = None;
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return likeness.width(); }
  Index experts() const noexcept { return likeness.experts(); }
  Index side() const noexcept { return experts(); }

  std::size_t params_bytes() const noexcept { return likeness.params_bytes() + row_bytes(); }
  std::size_t prepared_bytes() const noexcept { return likeness.prepared_bytes() + row_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept {
    return likeness.scratch_bytes(max_tokens, workers);
  }
  Params<T> make_params(Workspace& memory) const;
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index tokens) const {
    return likeness.take_tape(arena, tokens);
  }
  void check(const Params<const T>& params) const {
    likeness.check(params.likeness);
    require_shape("threshold", params.threshold, 1, experts());
  }
  void check_gradient(const Params<T>& grad) const {
    likeness.check_gradient(grad.likeness);
    if (grad.threshold.data != nullptr) {
      require_shape("grad.threshold", grad.threshold, 1, experts());
    }
  }

  void forward(const Prepared& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T> side, None, const Tape& tape, const Context& context) const;
  void backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T> dside, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const;

 private:
  std::size_t row_bytes() const noexcept {
    ByteCounter counter;
    counter.take<T>(1, experts());
    return counter.bytes();
  }
};

template <class T>
struct TopAnyRule {
  bool average = true;

  static constexpr GradientKind gradient = GradientKind::straight_through;
  Index max_per_token(Index experts) const noexcept { return experts; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class TopAnyRouter : public HeadRouter<T, TopAnyHead<T>, TopAnyRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    bool average = true;  ///< gates 1 / |S|, else 1
    T scale = T(1);

    static constexpr std::string_view kind() noexcept { return "top_any"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"average"}, c.average...);
      f(Field{"scale"}, c.scale...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit TopAnyRouter(const Config& config)
      : HeadRouter<T, TopAnyHead<T>, TopAnyRule<T>>(
            {{linear_head<T>("TopAnyRouter", config.width, config.experts, false).linear,
              config.scale}},
            {config.average}),
        config_(config) {
    require_finite("TopAnyRouter", "scale", config.scale);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
auto TopAnyHead<T>::make_params(Workspace& memory) const -> Params<T> {
  Params<T> params;
  params.likeness = likeness.make_params(memory);
  params.threshold = memory.template take<T>(1, experts());
  return params;
}

template <class T>
auto TopAnyHead<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  check(params);
  const MatView<T> threshold = memory.template take<T>(1, experts());
  std::ranges::copy(params.threshold.row(0), threshold.data);
  return {likeness.prepare(params.likeness, memory), threshold};
}

template <class T>
void TopAnyHead<T>::forward(const Prepared& prepared, const Tokens<T>& tokens, None,
                            MatView<T> logits, MatView<T> side, None, const Tape& tape,
                            const Context& context) const {
  likeness.forward(prepared.likeness, tokens, {}, logits, {}, {}, tape, context);
  for (Index t = 0; t < tokens.count(); ++t) {
    std::ranges::copy(prepared.threshold.row(0), side.row(t).begin());
  }
}

template <class T>
void TopAnyHead<T>::backward(const Params<const T>& params, const Tape& saved,
                             const Tokens<T>& tokens, None, MatView<const T> dlogits,
                             MatView<const T> dside, None, MatView<T> dx, const Params<T>& grad,
                             None, const Context& context) const {
  likeness.backward(params.likeness, saved, tokens, {}, dlogits, {}, {}, dx, grad.likeness, {},
                    context);
  if (grad.threshold.data == nullptr) return;
  for (Index e = 0; e < experts(); ++e) {
    double sum = 0;
    for (Index t = 0; t < tokens.count(); ++t) sum += static_cast<double>(dside(t, e));
    grad.threshold(0, e) += static_cast<T>(sum);
  }
}

template <class T>
Index TopAnyRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::score<T>(Score::sigmoid, row.logits, row.prob);
  Index count = 0;
  for (std::size_t e = 0; e < row.logits.size(); ++e) {
    if (row.logits[e] > row.side[e]) row.chosen[count++] = static_cast<std::int32_t>(e);
  }
  if (count == 0) count = stages::select_top_k<T>(row.logits, row.chosen.first(1));
  if (count == 0) return 0;
  std::fill_n(row.gate.begin(), count, average ? T(1) / static_cast<T>(count) : T(1));
  return count;
}

template <class T>
void TopAnyRule<T>::backward(const RuleRow<T>& row, None,
                             const RuleRowGradient<T>& d) const noexcept {
  stages::score_backward<T>(Score::sigmoid, row.logits, row.prob, d.dprob, d.dlogits);
  for (std::size_t i = 0; i < row.chosen.size(); ++i) {
    const std::int32_t e = row.chosen[i];
    const T share = d.dgate[i] * row.gate[i], s = row.prob[e];
    const T limit = math::sigmoid<T>(row.side[e]);
    d.dlogits[e] = std::fma(share, s * (T(1) - s), d.dlogits[e]);
    d.dside[e] = std::fma(-share, limit * (T(1) - limit), d.dside[e]);
  }
}

#ifndef MOLE_HEADER_ONLY
extern template struct TopAnyHead<float>;
extern template struct TopAnyHead<double>;
extern template struct TopAnyRule<float>;
extern template struct TopAnyRule<double>;
extern template class HeadRouter<float, TopAnyHead<float>, TopAnyRule<float>>;
extern template class HeadRouter<double, TopAnyHead<double>, TopAnyRule<double>>;
#endif

static_assert(Router<TopAnyRouter<float>>);
static_assert(Router<TopAnyRouter<double>>);

}  // namespace mole::inline MOLE_ABI

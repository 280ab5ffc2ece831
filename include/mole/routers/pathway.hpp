// SPDX-License-Identifier: Apache-2.0
// PathwayRouter: a linear top-k router in which chosen tokens follow a given pathway: weights ω of
// the experts that a test-time procedure found.
//
//   l = x Wᵀ + b (+ overrides)      p = softmax(l)
//   other tokens:   the k largest l, ties to the lower expert; g = p, or shares with renormalise
//   tokens with buffers.rows, where core names the experts of the pathway:
//     shares     s = ω' / Σ ω', with ω'_e = ω_e on the core and `floor` elsewhere; the k largest s,
//                g = s, or shares of it with renormalise
//     core       every core expert, g = ω, as it is
//     top_core   the k largest ω, 0 for experts outside the core; g = that value
//
// Shapes: x [tokens, width], W [experts, width], ω [1, experts] (carry_in.pathway; its gradient is
// added to d_carry_in.pathway), core [experts], empty: all. The tape's prob is p for every token.
//
// shares: the released code of C3PO (Li et al., "C3PO: Critical-Layer, Core-Expert, Collaborative
// Pathway Optimization for Test-Time Expert Re-Mixing", 2025), which sets the last token of every
// sequence. core: the paper's method.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

enum class PathwayGates { shares, core, top_core };
constexpr std::array<std::string_view, 3> enum_names(PathwayGates) noexcept {
  return {"shares", "core", "top_core"};
}

/// A linear head; the pathway is its side.
template <class T>
struct PathwayHead : LinearHead<T> {
  template <class V>
  struct Carry {
    MatView<V> pathway = {};  ///< [1, experts], ω; empty: zeros

    operator Carry<const V>() const noexcept  // NOLINT(google-explicit-constructor)
        requires(!std::is_const_v<V>) {
      return {pathway};
    }
  };

  Index side() const noexcept { return this->linear.experts; }

  void forward(const LinearPrepared<T>& prepared, const Tokens<T>& tokens,
               const Carry<const T>& carry_in, MatView<T> logits, MatView<T> side,
               const Carry<T>& carry_out, NoHeadTape, const Context& context) const;
  void backward(const LinearParams<const T>& params, NoHeadTape, const Tokens<T>& tokens,
                const Carry<const T>& carry_in, MatView<const T> dlogits, MatView<const T> dside,
                const Carry<T>& d_carry_out, MatView<T> dx, const LinearParams<T>& grad,
                const Carry<T>& d_carry_in, const Context& context) const;
};

template <class T>
struct PathwayRule {
  struct Buffers {
    std::span<const std::uint8_t> rows = {};  ///< [tokens], 1 = follows the pathway; empty: none
    std::span<const std::uint8_t> core = {};  ///< [experts], 1 = of the pathway; empty: all

    /// Of one call: not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  Index k = 1;
  PathwayGates gates = PathwayGates::shares;
  T floor = T(0);
  Weighting<T> weighting;

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index experts) const noexcept {
    return gates == PathwayGates::core ? experts : k;
  }
  void check(const Buffers& buffers, Index tokens, Index experts) const;
  Index forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept;
  void backward(const RuleRow<T>& row, const Buffers& buffers,
                const RuleRowGradient<T>& d) const noexcept;

 private:
  static bool follows(const RuleRow<T>& row, const Buffers& buffers) noexcept {
    return !buffers.rows.empty() && buffers.rows[row.token] != 0;
  }
  static bool is_core(const Buffers& buffers, Index e) noexcept {
    return buffers.core.empty() || buffers.core[e] != 0;
  }
  /// ω' or ω into the work row, -inf where an expert cannot be chosen. Their sum.
  T values(const RuleRow<T>& row, const Buffers& buffers) const noexcept;
  Index follow(const RuleRow<T>& row, const Buffers& buffers) const noexcept;
  void shares_of_pathway_backward(const RuleRow<T>& row, const Buffers& buffers,
                                  const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class PathwayRouter : public HeadRouter<T, PathwayHead<T>, PathwayRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 2;  ///< 1 ... experts
    bool renormalise = true;
    PathwayGates gates = PathwayGates::shares;
    T floor = T(1e-10);
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "pathway"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"gates"}, c.gates...);
      f(Field{"floor"}, c.floor...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit PathwayRouter(const Config& config)
      : HeadRouter<T, PathwayHead<T>, PathwayRule<T>>(
            {linear_head<T>("PathwayRouter", config.width, config.experts, config.bias)},
            {config.k,
             config.gates,
             config.floor,
             {Score::softmax, false, config.renormalise, T(0), T(1)}}),
        config_(config) {
    require_k("PathwayRouter", config.k, config.experts);
    require_from_zero("PathwayRouter", "floor", config.floor);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
void PathwayHead<T>::forward(const LinearPrepared<T>& prepared, const Tokens<T>& tokens,
                             const Carry<const T>& carry_in, MatView<T> logits, MatView<T> side,
                             const Carry<T>&, NoHeadTape, const Context& context) const {
  const MatView<const T> pathway = carry_in.pathway;
  if (pathway.data != nullptr) require_shape("carry_in.pathway", pathway, 1, this->linear.experts);
  stages::project<T>(prepared, tokens.x, logits, context);
  for (Index t = 0; t < side.rows; ++t) {
    for (Index e = 0; e < side.cols; ++e) side(t, e) = pathway.empty() ? T(0) : pathway(0, e);
  }
}

template <class T>
void PathwayHead<T>::backward(const LinearParams<const T>& params, NoHeadTape,
                              const Tokens<T>& tokens, const Carry<const T>&,
                              MatView<const T> dlogits, MatView<const T> dside, const Carry<T>&,
                              MatView<T> dx, const LinearParams<T>& grad,
                              const Carry<T>& d_carry_in, const Context& context) const {
  const MatView<T> d_pathway = d_carry_in.pathway;
  if (d_pathway.data != nullptr)
    require_shape("d_carry_in.pathway", d_pathway, 1, this->linear.experts);
  stages::project_backward<T>(params, tokens.x, dlogits, dx, grad, context);
  for (Index e = 0; e < d_pathway.cols; ++e) {
    double sum = 0;
    for (Index t = 0; t < dside.rows; ++t) sum += dside(t, e);
    d_pathway(0, e) += static_cast<T>(sum);
  }
}

template <class T>
void PathwayRule<T>::check(const Buffers& buffers, Index tokens, Index experts) const {
  require(buffers.rows.empty() || static_cast<Index>(buffers.rows.size()) == tokens,
          Errc::shape_mismatch, "buffers.rows: expected ", tokens, " tokens, got ",
          buffers.rows.size());
  require(buffers.core.empty() || static_cast<Index>(buffers.core.size()) == experts,
          Errc::shape_mismatch, "buffers.core: expected ", experts, " experts, got ",
          buffers.core.size());
}

template <class T>
T PathwayRule<T>::values(const RuleRow<T>& row, const Buffers& buffers) const noexcept {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  double sum = 0;
  for (std::size_t e = 0; e < row.logits.size(); ++e) {
    const bool core = is_core(buffers, static_cast<Index>(e));
    const T outside = gates == PathwayGates::core     ? kNever
                      : gates == PathwayGates::shares ? floor
                                                      : T(0);
    row.work[e] = core ? row.side[e] : outside;
    if (!(row.logits[e] > kNever)) row.work[e] = kNever;
    if (row.work[e] > kNever) sum += row.work[e];
  }
  return sum != 0 ? static_cast<T>(sum) : T(1);
}

template <class T>
Index PathwayRule<T>::follow(const RuleRow<T>& row, const Buffers& buffers) const noexcept {
  const T sum = values(row, buffers);
  const auto all = static_cast<Index>(row.logits.size());
  if (gates != PathwayGates::core) {
    const Index count = stages::select_top_k<T>(row.work, row.chosen.first(k));
    T divisor = gates == PathwayGates::shares ? sum : T(1);
    if (gates == PathwayGates::shares && weighting.renormalise) {
      divisor = T(0);
      for (Index i = 0; i < count; ++i) divisor += row.work[row.chosen[i]];
      if (divisor == T(0)) divisor = T(1);
    }
    for (Index i = 0; i < count; ++i) row.gate[i] = row.work[row.chosen[i]] / divisor;
    return count;
  }
  Index count = 0;
  for (Index e = 0; e < all; ++e) {
    if (!(row.work[e] > -std::numeric_limits<T>::infinity())) continue;
    row.chosen[count] = static_cast<std::int32_t>(e);
    row.gate[count++] = row.work[e];
  }
  return count;
}

template <class T>
Index PathwayRule<T>::forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept {
  stages::score<T>(weighting.score, row.logits, row.prob);
  if (follows(row, buffers)) return follow(row, buffers);
  const Index count = stages::select_top_k<T>(row.logits, row.chosen.first(k));
  stages::weigh<T>(weighting, row.logits, row.prob, row.chosen.first(count), row.gate.first(count));
  return count;
}

template <class T>
void PathwayRule<T>::shares_of_pathway_backward(const RuleRow<T>& row, const Buffers& buffers,
                                                const RuleRowGradient<T>& d) const noexcept {
  T sum = values(row, buffers), mean = T(0);
  if (weighting.renormalise) {
    sum = T(0);
    for (const std::int32_t e : row.chosen) sum += row.work[e];
    if (sum == T(0)) sum = T(1);
  }
  for (std::size_t i = 0; i < row.chosen.size(); ++i) {
    mean = std::fma(d.dgate[i], row.gate[i], mean);
  }
  const auto add = [&](std::int32_t e, T change) {
    if (is_core(buffers, e) && row.work[e] > -std::numeric_limits<T>::infinity()) {
      d.dside[e] += change / sum;
    }
  };
  for (std::size_t i = 0; i < row.chosen.size(); ++i) add(row.chosen[i], d.dgate[i]);
  if (weighting.renormalise) {
    for (const std::int32_t e : row.chosen) add(e, -mean);
  } else {
    for (std::size_t e = 0; e < row.side.size(); ++e) add(static_cast<std::int32_t>(e), -mean);
  }
}

template <class T>
void PathwayRule<T>::backward(const RuleRow<T>& row, const Buffers& buffers,
                              const RuleRowGradient<T>& d) const noexcept {
  if (!follows(row, buffers)) return weighted_scores_backward(weighting, row, d);
  if (gates == PathwayGates::shares) {
    shares_of_pathway_backward(row, buffers, d);
  } else {
    for (std::size_t i = 0; i < row.chosen.size(); ++i) {
      if (is_core(buffers, row.chosen[i])) d.dside[row.chosen[i]] += d.dgate[i];
    }
  }
  stages::score_backward<T>(weighting.score, row.logits, row.prob, d.dprob, d.dlogits);
}

#ifndef MOLE_HEADER_ONLY
extern template struct PathwayHead<float>;
extern template struct PathwayHead<double>;
extern template struct PathwayRule<float>;
extern template struct PathwayRule<double>;
extern template class HeadRouter<float, PathwayHead<float>, PathwayRule<float>>;
extern template class HeadRouter<double, PathwayHead<double>, PathwayRule<double>>;
#endif

static_assert(Router<PathwayRouter<float>>);
static_assert(Router<PathwayRouter<double>>);

}  // namespace mole::inline MOLE_ABI

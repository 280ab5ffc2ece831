// SPDX-License-Identifier: Apache-2.0
// SinkhornRouter: while training, tokens are chosen by a plan that loads all experts alike.
//
//   l = x Wᵀ + b (+ overrides)
//   plan_te = u_t e^(l_te) v_e, from v = 1:   u_t = 1 / (tokens · (Σ_e v_e e^(l_te) + epsilon))
//                                             v_e = 1 / (experts · (Σ_t u_t e^(l_te) + epsilon))
//   until mean |v - v before| <= tolerance, at most max_iterations times
//   S = the k largest plan_te of the row, ties to the lower expert; at inference the k largest l_te
//   g = σ(l) for k = 1, else softmax(l), on S
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. The plan has no gradient. Rows
// without an available expert stay out of it.
//
// Clark et al., "Unified Scaling Laws for Routed Language Models", 2022; Megatron-LM.
#pragma once

#include <cmath>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/capacity.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct SinkhornRule {
  struct Buffers {
    bool balance = true;  ///< choose by the plan; false: as at inference

    /// Inputs of one call: not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  Index k = 1, max_iterations = 10'000;
  T epsilon = T(1e-8), tolerance = T(1e-4);

  Index max_per_token(Index) const noexcept { return k; }
  std::size_t scratch_bytes(Index tokens, Index experts, int workers) const noexcept;
  void forward(const RuleBatch<T>& batch, const Buffers& buffers, RoutingTable<T>& table,
               const Context& context) const;
  void backward(const RuleBatch<T>& batch, const Buffers& buffers, const Routing<T>& routing,
                const RuleBatchGradient<T>& d, const Context& context) const;

  /// Fills u [tokens] and v [experts]; returns how many times v was formed anew.
  Index scale(MatView<const T> logits, std::span<T> token_scaling, std::span<T> expert_scaling,
              std::span<T> work) const noexcept;
};

template <class T>
class SinkhornRouter : public HeadRouter<T, LinearHead<T>, SinkhornRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 1;  ///< 1 ... experts
    T epsilon = T(1e-8);
    T tolerance = T(1e-4);
    Index max_iterations = 10'000;
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "sinkhorn"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"epsilon"}, c.epsilon...);
      f(Field{"tolerance"}, c.tolerance...);
      f(Field{"max_iterations"}, c.max_iterations...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit SinkhornRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, SinkhornRule<T>>(
            linear_head<T>("SinkhornRouter", config.width, config.experts, config.bias),
            {config.k, config.max_iterations, config.epsilon, config.tolerance}),
        config_(config) {
    constexpr const char* kName = "SinkhornRouter";
    require_k(kName, config.k, config.experts);
    require_from_zero(kName, "epsilon", config.epsilon);
    require_from_zero(kName, "tolerance", config.tolerance);
    require_count(kName, "max_iterations", config.max_iterations);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
std::size_t SinkhornRule<T>::scratch_bytes(Index tokens, Index experts,
                                           int workers) const noexcept {
  ByteCounter counter;
  counter.take<T>(tokens);
  counter.take<T>(experts);
  counter.take<T>(experts);
  counter.take<T>(experts);
  counter.take<std::int32_t>(k);
  return counter.bytes() + stages::softmax_gates_backward_bytes(experts, workers);
}

template <class T>
Index SinkhornRule<T>::scale(MatView<const T> logits, std::span<T> token_scaling,
                             std::span<T> expert_scaling, std::span<T> work) const noexcept {
  const Index count = logits.rows, experts = logits.cols;
  std::fill(expert_scaling.begin(), expert_scaling.end(), T(1));
  for (Index iteration = 1;; ++iteration) {
    std::fill(work.begin(), work.end(), T(0));
    for (Index t = 0; t < count; ++t) {
      T sum = T(0);
      for (Index e = 0; e < experts; ++e) {
        sum = std::fma(expert_scaling[e], math::exp<T>(logits(t, e)), sum);
      }
      token_scaling[t] = sum > T(0) && std::isfinite(sum)
                             ? T(1) / (static_cast<T>(count) * (sum + epsilon))
                             : T(0);
      for (Index e = 0; e < experts && token_scaling[t] > T(0); ++e) {
        work[e] = std::fma(token_scaling[t], math::exp<T>(logits(t, e)), work[e]);
      }
    }
    T moved = T(0);
    for (Index e = 0; e < experts; ++e) {
      const T next = T(1) / (static_cast<T>(experts) * (work[e] + epsilon));
      moved += std::fabs(next - expert_scaling[e]);
      expert_scaling[e] = next;
    }
    if (!(moved / static_cast<T>(experts) > tolerance) || iteration == max_iterations) {
      return iteration;
    }
  }
}

template <class T>
void SinkhornRule<T>::forward(const RuleBatch<T>& batch, const Buffers& buffers,
                              RoutingTable<T>& table, const Context& context) const {
  const Index count = batch.logits.rows, experts = batch.logits.cols;
  const Workspace::Frame frame(context.scratch);
  const auto u = context.scratch.template take<T>(count);
  const auto v = context.scratch.template take<T>(experts);
  const auto key = context.scratch.template take<T>(experts);
  const auto gate = context.scratch.template take<T>(experts);
  const auto chosen = context.scratch.take<std::int32_t>(k);
  if (buffers.balance) scale(batch.logits, u, v, key);
  for (Index t = 0; t < count; ++t) {
    const std::span<const T> logits = batch.logits.row(t);
    stages::score<T>(k == 1 ? Score::sigmoid : Score::softmax, logits, batch.prob.row(t));
    for (Index e = 0; e < experts; ++e) {
      // A factor u_t > 0 would not change the order within the row. A row with +infinity, and one
      // without an available expert, is ranked by its logits.
      const bool planned = buffers.balance && u[t] > T(0) && std::isfinite(logits[e]);
      key[e] = planned ? math::exp<T>(logits[e]) * v[e] : logits[e];
    }
    const auto slots = static_cast<std::size_t>(stages::select_top_k<T>(key, chosen));
    for (std::size_t i = 0; i < slots; ++i) gate[i] = batch.prob(t, chosen[i]);
    table.select(t, chosen.first(slots), gate.first(slots));
  }
}

template <class T>
void SinkhornRule<T>::backward(const RuleBatch<T>& batch, const Buffers&, const Routing<T>& routing,
                               const RuleBatchGradient<T>& d, const Context& context) const {
  if (k > 1) {
    return stages::softmax_gates_backward<T>(batch.logits, batch.prob, routing, d.dgate, d.dprob,
                                             d.dlogits, context, stages::add_scores<T>);
  }
  stages::sigmoid_gates_backward<T>(batch.logits, batch.prob, routing, d.dgate, d.dprob, d.dlogits,
                                    context);
}

#ifndef MOLE_HEADER_ONLY
extern template struct SinkhornRule<float>;
extern template struct SinkhornRule<double>;
extern template class HeadRouter<float, LinearHead<float>, SinkhornRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, SinkhornRule<double>>;
#endif

static_assert(Router<SinkhornRouter<float>>);
static_assert(Router<SinkhornRouter<double>>);

}  // namespace mole::inline MOLE_ABI

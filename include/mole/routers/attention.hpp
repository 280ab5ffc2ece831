// SPDX-License-Identifier: Apache-2.0
// AttentionRouter: top-k of logits that come from attention among the experts, so that what an
// expert gets depends on how it goes with the others.
//
//   q = x W_qᵀ     k = x W_kᵀ     v = x W_vᵀ     l_i = Σ_j softmax_j(q_i k_j) v_j (+ overrides)
//   u = l / temperature     S = the k largest, ties to the lower expert
//   g = score(u) on S, but softmax over S alone for topk_then_score with softmax
//   g <- g / (Σ_S g + renorm_epsilon) with renormalise        g <- scale · g
//
// Shapes: x [tokens, width], W_q, W_k, W_v [experts, width], each with a bias [1, experts] if there
// is one; l, u [tokens, experts]. The selection is a constant in backward. A token costs experts²
// exponentials; what is not finite is dealt with as attention_head.hpp says.
//
// Wu et al., "Yuan 2.0-M32: Mixture of Experts with Attention Router", 2024: 32 experts, k = 2, no
// bias. The products are not scaled, in the paper and in the code. Released code weighs the two by
// the softmax of their logits (training, vLLM), or by the softmax of all divided by their sum
// (transformers): the same gates, those of the defaults here. Training code keeps the three maps in
// one matrix, in the order query, key, value.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/attention_head.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/top_k_rule.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class AttentionRouter : public HeadRouter<T, AttentionHead<T>, TopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 2;  ///< 1 ... experts
    Score score = Score::softmax;
    TopKOrder order = TopKOrder::score_then_topk;
    bool renormalise = true;
    T renorm_epsilon = T(0);
    T temperature = T(1);
    T scale = T(1);
    bool bias = false;  ///< every map has a bias

    static constexpr std::string_view kind() noexcept { return "attention"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"score"}, c.score...);
      f(Field{"order"}, c.order...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"renorm_epsilon"}, c.renorm_epsilon...);
      f(Field{"temperature"}, c.temperature...);
      f(Field{"scale"}, c.scale...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit AttentionRouter(const Config& config)
      : HeadRouter<T, AttentionHead<T>, TopKRule<T>>(
            {linear_head<T>("AttentionRouter", config.width, config.experts, config.bias).linear},
            {config.k,
             {config.score, config.order == TopKOrder::topk_then_score, config.renormalise,
              config.renorm_epsilon, config.scale},
             config.temperature}),
        config_(config) {
    require_k("AttentionRouter", config.k, config.experts);
    require_from_zero("AttentionRouter", "renorm_epsilon", config.renorm_epsilon);
    require_positive("AttentionRouter", "temperature", config.temperature);
    require_finite("AttentionRouter", "scale", config.scale);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

#ifndef MOLE_HEADER_ONLY
extern template class HeadRouter<float, AttentionHead<float>, TopKRule<float>>;
extern template class HeadRouter<double, AttentionHead<double>, TopKRule<double>>;
#endif

static_assert(Router<AttentionRouter<float>>);
static_assert(Router<AttentionRouter<double>>);

}  // namespace mole::inline MOLE_ABI

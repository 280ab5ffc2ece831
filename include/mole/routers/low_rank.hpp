// SPDX-License-Identifier: Apache-2.0
// LowRankRouter: top-k of logits that pass through few columns.
//
//   l = (x Aᵀ) Bᵀ (+ overrides)     u = l / temperature     S = the k largest, ties to the lower
//   g = softmax(u) on S, divided by its sum with renormalise
//
// Shapes: x [tokens, width], A [rank, width], B [experts, rank]. The selection is a constant in
// backward. The head costs rank · (width + experts) instead of width · experts; its parameters are
// named hidden (A) and output (B).
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/mlp_head.hpp"
#include "mole/routing/top_k_rule.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class LowRankRouter : public HeadRouter<T, MlpHead<T>, TopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index rank = 8;
    Index k = 2;  ///< 1 ... experts
    bool renormalise = true;
    T temperature = T(1);

    static constexpr std::string_view kind() noexcept { return "low_rank"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("rank"), c.rank...);
      f(Field::required("k"), c.k...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"temperature"}, c.temperature...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit LowRankRouter(const Config& config)
      : HeadRouter<T, MlpHead<T>, TopKRule<T>>(
            checked_head(config), softmax_top_k<T>("LowRankRouter", config.experts, config.k,
                                                   config.renormalise, config.temperature)),
        config_(config) {}

  const Config& config() const noexcept { return config_; }

 private:
  static MlpHead<T> checked_head(const Config& config) {
    require_count("LowRankRouter", "rank", config.rank);
    return mlp_head<T>("LowRankRouter", config.width, config.experts, config.rank, 0,
                       HeadActivation::identity, false);
  }

  Config config_;
};

#ifndef MOLE_HEADER_ONLY
extern template class HeadRouter<float, MlpHead<float>, TopKRule<float>>;
extern template class HeadRouter<double, MlpHead<double>, TopKRule<double>>;
#endif

static_assert(Router<LowRankRouter<float>>);
static_assert(Router<LowRankRouter<double>>);

}  // namespace mole::inline MOLE_ABI

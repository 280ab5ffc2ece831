// SPDX-License-Identifier: Apache-2.0
// HardTopKRouter: the k best experts, all with weight 1.
//
//   l = x Wᵀ + b (+ overrides)    p = softmax(l)    S = the k largest l, ties to the lower expert
//   g = 1 on S. The gates are constants: W learns from losses only.
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. The selection is a constant in
// backward.
//
// Chen et al., "LLaVA-MoLE", 2024, with k = 1.
#pragma once

#include <algorithm>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct HardTopKRule {
  Index k = 1;

  Index max_per_token(Index) const noexcept { return k; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class HardTopKRouter : public HeadRouter<T, LinearHead<T>, HardTopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 1;        ///< 1 ... experts
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "hard_top_k"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit HardTopKRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, HardTopKRule<T>>(
            linear_head<T>("HardTopKRouter", config.width, config.experts, config.bias),
            {config.k}),
        config_(config) {
    require_k("HardTopKRouter", config.k, config.experts);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index HardTopKRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  const Index count = stages::select_top_k<T>(row.logits, row.chosen.first(k));
  std::fill_n(row.gate.begin(), count, T(1));
  return count;
}

template <class T>
void HardTopKRule<T>::backward(const RuleRow<T>& row, None,
                               const RuleRowGradient<T>& d) const noexcept {
  stages::softmax_backward<T>(row.prob, d.dprob, d.dlogits);
}

#ifndef MOLE_HEADER_ONLY
extern template struct HardTopKRule<float>;
extern template struct HardTopKRule<double>;
extern template class HeadRouter<float, LinearHead<float>, HardTopKRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, HardTopKRule<double>>;
#endif

static_assert(Router<HardTopKRouter<float>>);
static_assert(Router<HardTopKRouter<double>>);

}  // namespace mole::inline MOLE_ABI

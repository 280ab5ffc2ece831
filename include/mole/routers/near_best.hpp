// SPDX-License-Identifier: Apache-2.0
// NearBestRouter: the best expert works with gate 1, and so does every expert as good as it.
//
//   p = softmax(x Wᵀ + b (+ overrides))     S = the experts with p > max p - margin     g = 1 on S
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. Ties add experts: their outputs
// are summed, not averaged. The gates are constants, so the router learns from losses on p alone
// (importance_loss of the mean scores), or is fitted from outside.
//
// With x the context of the token's environment (LayerInput::router_x), this is the router of
// Nzoyem et al., "MixER: Better Mixture of Experts Routing for Hierarchical Meta-Learning", 2025.
// Where its expert e also reads a piece of the context of its own, f_e(x) + C_e ξ_e, that is a
// second mixture on the same routing, whose bank reads the context: LoRA experts with `down` from
// fill_piece and `up` = C_e.
#pragma once

#include <limits>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct NearBestRule {
  T margin = T(1e-6);

  Index max_per_token(Index experts) const noexcept { return experts; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept {
    stages::softmax_backward<T>(row.prob, d.dprob, d.dlogits);
  }
};

template <class T>
class NearBestRouter : public HeadRouter<T, LinearHead<T>, NearBestRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    T margin = T(1e-6);  ///< positive
    bool bias = false;   ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "near_best"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"margin"}, c.margin...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit NearBestRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, NearBestRule<T>>(
            linear_head<T>("NearBestRouter", config.width, config.experts, config.bias),
            {config.margin}),
        config_(config) {
    require_positive("NearBestRouter", "margin", config.margin);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index NearBestRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::softmax<T>(row.logits, row.prob);
  T best = T(0);
  for (const T p : row.prob) best = std::max(best, p);
  Index count = 0;
  for (std::size_t e = 0; e < row.prob.size(); ++e) {
    if (row.logits[e] == -std::numeric_limits<T>::infinity()) continue;
    if (!(row.prob[e] > best - margin)) continue;
    row.gate[count] = T(1);
    row.chosen[count++] = static_cast<std::int32_t>(e);
  }
  return count;
}

/// down [width of a piece, width of the context]: the rows of the identity that pick piece `piece`
/// out of the context. Throws shape_mismatch if the context has no such piece.
template <class T>
void fill_piece(MatView<T> down, Index piece) {
  require(piece >= 0 && (piece + 1) * down.rows <= down.cols, Errc::shape_mismatch, "piece ", piece,
          " of ", down.rows, " columns is not in a context of ", down.cols);
  for (Index r = 0; r < down.rows; ++r) {
    for (Index c = 0; c < down.cols; ++c) {
      down(r, c) = c == piece * down.rows + r ? T(1) : T(0);
    }
  }
}

#ifndef MOLE_HEADER_ONLY
extern template struct NearBestRule<float>;
extern template struct NearBestRule<double>;
extern template class HeadRouter<float, LinearHead<float>, NearBestRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, NearBestRule<double>>;
#endif

static_assert(Router<NearBestRouter<float>>);
static_assert(Router<NearBestRouter<double>>);

}  // namespace mole::inline MOLE_ABI

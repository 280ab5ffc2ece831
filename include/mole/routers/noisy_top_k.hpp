// SPDX-License-Identifier: Apache-2.0
// NoisyTopKRouter: top-k of logits with trained noise, so that every expert gets a chance.
//
//   l = x Wᵀ + b (+ overrides)     sd = softplus(x Vᵀ) + noise_epsilon     z = l + noise · sd
//   softmax_then_topk:  v = softmax(z), S = the k largest, g = v / (Σ_S v + renorm_epsilon)
//   topk_then_softmax:  S = the k largest z, g = softmax of z over S
//
// Shapes: x [tokens, width], W, V [experts, width], noise [tokens, experts], standard normal
// numbers of the caller (mole::Random gives the same ones for any number of threads); without noise
// z = l, as in inference. The selection is a constant in backward. The tape has l in `logits`, x Vᵀ
// in `side` and softmax(z) in `prob`. Losses: losses/importance.hpp, losses/noisy_load.hpp.
//
// Shazeer et al., "Outrageously Large Neural Networks", 2017 (topk_then_softmax).
#pragma once

#include <array>
#include <cmath>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

/// What NoisyTopKRouter does first.
enum class NoisyOrder { softmax_then_topk, topk_then_softmax };
constexpr std::array<std::string_view, 2> enum_names(NoisyOrder) noexcept {
  return {"softmax_then_topk", "topk_then_softmax"};
}

template <class T>
struct NoisyTopKRule {
  struct Buffers {
    MatView<const T> noise = {};  ///< [tokens, experts], or empty

    /// Inputs of one call: not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  Index k = 2;
  T noise_epsilon = T(0.01);
  Weighting<T> weighting;

  static constexpr Index kWorkRows = 3;
  Index max_per_token(Index) const noexcept { return k; }
  void check(const Buffers& buffers, Index tokens, Index experts) const {
    if (buffers.noise.data != nullptr) require_shape("noise", buffers.noise, tokens, experts);
  }
  Index forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept;
  void backward(const RuleRow<T>& row, const Buffers& buffers,
                const RuleRowGradient<T>& d) const noexcept;

  /// z of one token.
  void noisy_logits(std::span<const T> logits, std::span<const T> side, std::span<const T> noise,
                    std::span<T> z) const noexcept;
};

template <class T>
class NoisyTopKRouter : public HeadRouter<T, LinearPairHead<T>, NoisyTopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 2;  ///< 1 ... experts
    NoisyOrder order = NoisyOrder::topk_then_softmax;
    T noise_epsilon = T(0.01);
    T renorm_epsilon = T(1e-6);  ///< of softmax_then_topk
    bool bias = false;           ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "noisy_top_k"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"order"}, c.order...);
      f(Field{"noise_epsilon"}, c.noise_epsilon...);
      f(Field{"renorm_epsilon"}, c.renorm_epsilon...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit NoisyTopKRouter(const Config& config)
      : HeadRouter<T, LinearPairHead<T>, NoisyTopKRule<T>>(
            {linear_head<T>("NoisyTopKRouter", config.width, config.experts, config.bias).linear,
             {config.width, config.experts, false}},
            {config.k, config.noise_epsilon,
             config.order == NoisyOrder::topk_then_softmax
                 ? Weighting<T>{Score::softmax, true, false, T(0), T(1)}
                 : Weighting<T>{Score::softmax, false, true, config.renorm_epsilon, T(1)}}),
        config_(config) {
    constexpr const char* kName = "NoisyTopKRouter";
    require_k(kName, config.k, config.experts);
    require_from_zero(kName, "noise_epsilon", config.noise_epsilon);
    require_from_zero(kName, "renorm_epsilon", config.renorm_epsilon);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
void NoisyTopKRule<T>::noisy_logits(std::span<const T> logits, std::span<const T> side,
                                    std::span<const T> noise, std::span<T> z) const noexcept {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  for (std::size_t e = 0; e < z.size(); ++e) {
    const T deviation = math::softplus<T>(side[e]) + noise_epsilon;
    const T sum = std::fma(noise[e], deviation, logits[e]);
    z[e] = !std::isfinite(logits[e]) ? logits[e] : std::isfinite(sum) ? sum : kNever;
  }
}

template <class T>
Index NoisyTopKRule<T>::forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept {
  const std::size_t experts = row.logits.size();
  const std::span<T> z = row.work.first(experts);
  if (buffers.noise.data != nullptr) {
    noisy_logits(row.logits, row.side, buffers.noise.row(row.token), z);
  } else {
    std::copy(row.logits.begin(), row.logits.end(), z.begin());
  }
  stages::softmax<T>(z, row.prob);
  const Index count = stages::select_top_k<T>(z, row.chosen.first(k));
  stages::weigh<T>(weighting, z, row.prob, row.chosen.first(count), row.gate.first(count));
  return count;
}

template <class T>
void NoisyTopKRule<T>::backward(const RuleRow<T>& row, const Buffers& buffers,
                                const RuleRowGradient<T>& d) const noexcept {
  const std::size_t experts = row.logits.size();
  const std::span<T> z = row.work.first(experts), dprob = row.work.subspan(experts, experts),
                     dz = row.work.subspan(2 * experts, experts);
  const bool noisy = buffers.noise.data != nullptr;
  if (noisy) {
    noisy_logits(row.logits, row.side, buffers.noise.row(row.token), z);
  } else {
    std::copy(row.logits.begin(), row.logits.end(), z.begin());
  }
  std::copy(d.dprob.begin(), d.dprob.end(), dprob.begin());
  std::fill(dz.begin(), dz.end(), T(0));
  stages::weigh_backward<T>(weighting, z, row.prob, row.chosen, d.dgate, dprob, dz, row.gate);
  stages::softmax_backward<T>(row.prob, dprob, dz);
  for (std::size_t e = 0; e < experts; ++e) {
    d.dlogits[e] += dz[e];
    if (!noisy || !std::isfinite(row.side[e])) continue;
    const T slope = buffers.noise(row.token, static_cast<Index>(e)) * math::sigmoid<T>(row.side[e]);
    d.dside[e] = std::fma(dz[e], slope, d.dside[e]);
  }
}

#ifndef MOLE_HEADER_ONLY
extern template struct NoisyTopKRule<float>;
extern template struct NoisyTopKRule<double>;
extern template class HeadRouter<float, LinearPairHead<float>, NoisyTopKRule<float>>;
extern template class HeadRouter<double, LinearPairHead<double>, NoisyTopKRule<double>>;
#endif

static_assert(Router<NoisyTopKRouter<float>>);
static_assert(Router<NoisyTopKRouter<double>>);

}  // namespace mole::inline MOLE_ABI

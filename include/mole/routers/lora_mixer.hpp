// SPDX-License-Identifier: Apache-2.0
// LoraMixerRouter: one linear router in the three phases of LoRA-Mixer.
//
//   l = x Wᵀ + b (+ overrides)      p = softmax(l)
//   hard    the expert that tokens.ids names, g = 1; W learns from losses only
//   soft    every expert, g = p
//   top_k   the k largest l, ties to the lower expert; g = p, or their shares with renormalise
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. In the hard phase a token whose id
// is no expert, or a forbidden one, has no slot. The specialisation loss is balance_loss without
// the factor E, or square_usage_loss, and entropy_loss.
//
// "LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing", 2025: experts are
// trained on their domains (hard), the router on mixed data (soft), and used sparsely (top_k).
#pragma once

#include <array>
#include <limits>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

enum class MixerPhase { hard, soft, top_k };
constexpr std::array<std::string_view, 3> enum_names(MixerPhase) noexcept {
  return {"hard", "soft", "top_k"};
}

template <class T>
struct LoraMixerRule {
  MixerPhase phase = MixerPhase::soft;
  Index k = 1;
  Weighting<T> weighting;

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index experts) const noexcept {
    if (phase == MixerPhase::soft) return experts;
    return phase == MixerPhase::hard ? 1 : k;
  }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class LoraMixerRouter : public HeadRouter<T, LinearHead<T>, LoraMixerRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    MixerPhase phase = MixerPhase::soft;
    Index k = 2;  ///< of the top_k phase, 1 ... experts
    bool renormalise = true;
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "lora_mixer"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("phase"), c.phase...);
      f(Field{"k"}, c.k...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit LoraMixerRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, LoraMixerRule<T>>(
            linear_head<T>("LoraMixerRouter", config.width, config.experts, config.bias),
            {config.phase,
             config.k,
             {Score::softmax, false, config.renormalise && config.phase == MixerPhase::top_k, T(0),
              T(1)}}),
        config_(config) {
    require_field(
        config.phase != MixerPhase::top_k || (config.k >= 1 && config.k <= config.experts),
        "LoraMixerRouter", "k", "1 ... experts", config.k);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index LoraMixerRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  stages::score<T>(weighting.score, row.logits, row.prob);
  if (phase == MixerPhase::hard) {
    const bool known = row.id >= 0 && row.id < static_cast<Index>(row.logits.size());
    if (!known || !(row.logits[row.id] > -std::numeric_limits<T>::infinity())) return 0;
    row.chosen[0] = row.id;
    row.gate[0] = T(1);
    return 1;
  }
  Index count = 0;
  if (phase == MixerPhase::top_k) {
    count = stages::select_top_k<T>(row.logits, row.chosen.first(k));
  } else {
    for (std::size_t e = 0; e < row.logits.size(); ++e) {
      if (!(row.logits[e] > -std::numeric_limits<T>::infinity())) continue;
      row.chosen[count++] = static_cast<std::int32_t>(e);
    }
  }
  stages::weigh<T>(weighting, row.logits, row.prob, row.chosen.first(count), row.gate.first(count));
  return count;
}

template <class T>
void LoraMixerRule<T>::backward(const RuleRow<T>& row, None,
                                const RuleRowGradient<T>& d) const noexcept {
  if (phase != MixerPhase::hard) return weighted_scores_backward(weighting, row, d);
  stages::score_backward<T>(weighting.score, row.logits, row.prob, d.dprob, d.dlogits);
}

#ifndef MOLE_HEADER_ONLY
extern template struct LoraMixerRule<float>;
extern template struct LoraMixerRule<double>;
extern template class HeadRouter<float, LinearHead<float>, LoraMixerRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, LoraMixerRule<double>>;
#endif

static_assert(Router<LoraMixerRouter<float>>);
static_assert(Router<LoraMixerRouter<double>>);

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// DeepSeekRouter: top-k within the best groups of experts, balanced by a bias instead of a loss.
//
//   l = x Wᵀ + b (+ overrides)      s = softmax(l) or σ(l)      key = s + selection_bias
//   groups: consecutive blocks of experts / groups; the score of a group is the sum of its
//           group_score_top largest keys; the keep_groups best stay, keys of the others become
//           -infinity, or 0 with fill_zero
//   S = the k largest keys, ties to the lower expert
//   g = route_scale · s on S, or route_scale · s / (Σ_S s + renorm_epsilon) with renormalise
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts], selection_bias [experts]. The
// selection is a constant in backward; the bias ranks and never weighs (updates: balance_bias.hpp).
//
// DeepSeek-V2 (softmax, group_score_top 1, no renormalisation) and V3 (sigmoid, group_score_top 2,
// renormalised, route_scale 2.5). The authors' gate for training and AXK2 in transformers fill with
// 0, which elects experts of a dropped group where all keys are negative; V3's inference code fills
// with -infinity. Megatron's group score has group_score_top = k / keep_groups.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct DeepSeekRule {
  struct Buffers {
    std::span<const T> selection_bias = {};  ///< [experts], or empty

    template <class F, class... B>
    static void visit(F&& f, B&... b) {
      f(Leaf{"selection_bias"}, b.selection_bias...);
    }
  };
  struct Groups {
    Index count = 1, keep = 1, score_top = 2;
    bool fill_zero = false;
  };

  Index k = 1;
  Weighting<T> weighting;
  Groups groups;

  static constexpr Index kWorkRows = 2;
  Index max_per_token(Index) const noexcept { return k; }
  void check(const Buffers& buffers, Index tokens, Index experts) const;
  Index forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept;
  void backward(const RuleRow<T>& row, const Buffers& buffers,
                const RuleRowGradient<T>& d) const noexcept;

 private:
  /// Takes the keys of all but the best groups away.
  void limit_to_groups(std::span<T> key, std::span<T> score,
                       std::span<std::int32_t> order) const noexcept;
};

template <class T>
class DeepSeekRouter : public HeadRouter<T, LinearHead<T>, DeepSeekRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 8;                   ///< 1 ... experts
    Score score = Score::sigmoid;  ///< softmax or sigmoid
    Index groups = 1;              ///< divides experts
    Index keep_groups = 1;         ///< 1 ... groups
    Index group_score_top = 2;     ///< 1 ... experts / groups; only with more than one group
    bool fill_zero = false;
    bool renormalise = true;
    T renorm_epsilon = T(0);
    T route_scale = T(1);
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "deepseek"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"score"}, c.score...);
      f(Field{"groups"}, c.groups...);
      f(Field{"keep_groups"}, c.keep_groups...);
      f(Field{"group_score_top"}, c.group_score_top...);
      f(Field{"fill_zero"}, c.fill_zero...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"renorm_epsilon"}, c.renorm_epsilon...);
      f(Field{"route_scale"}, c.route_scale...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit DeepSeekRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, DeepSeekRule<T>>(
            linear_head<T>("DeepSeekRouter", config.width, config.experts, config.bias),
            {config.k,
             {config.score, false, config.renormalise, config.renorm_epsilon, config.route_scale},
             {config.groups, config.keep_groups, config.group_score_top, config.fill_zero}}),
        config_(config) {
    constexpr const char* kName = "DeepSeekRouter";
    require_field(config.groups >= 1 && config.experts % config.groups == 0, kName, "groups",
                  "a divisor of experts", config.groups);
    require_field(config.keep_groups >= 1 && config.keep_groups <= config.groups, kName,
                  "keep_groups", "1 ... groups", config.keep_groups);
    const Index block = config.experts / config.groups;
    require_field(
        config.groups == 1 || (config.group_score_top >= 1 && config.group_score_top <= block),
        kName, "group_score_top", "1 ... experts / groups", config.group_score_top);
    require_field(config.k >= 1 &&
                      config.k <= (config.fill_zero ? config.experts : config.keep_groups * block),
                  kName, "k", "1 ... experts of the kept groups", config.k);
    require_from_zero(kName, "renorm_epsilon", config.renorm_epsilon);
    require_finite(kName, "route_scale", config.route_scale);
  }

  const Config& config() const noexcept { return config_; }
  /// Throws shape_mismatch.
  void require_buffers(const typename DeepSeekRule<T>::Buffers& buffers) const {
    this->rule().check(buffers, 0, this->experts());
  }

 private:
  Config config_;
};

template <class T>
void DeepSeekRule<T>::check(const Buffers& buffers, Index, Index experts) const {
  require(buffers.selection_bias.empty() ||
              static_cast<Index>(buffers.selection_bias.size()) == experts,
          Errc::shape_mismatch, "selection_bias: expected ", experts, " values, got ",
          buffers.selection_bias.size());
}

template <class T>
void DeepSeekRule<T>::limit_to_groups(std::span<T> key, std::span<T> score,
                                      std::span<std::int32_t> order) const noexcept {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const auto count = static_cast<std::size_t>(groups.count);
  const std::size_t block = key.size() / count;
  for (std::size_t g = 0; g < count; ++g) {
    const std::span<const T> keys = key.subspan(g * block, block);
    const Index best = stages::select_top_k<T>(keys, order.first(groups.score_top));
    score[g] = best > 0 ? T(0) : kNever;
    for (Index i = 0; i < best; ++i) score[g] += keys[order[i]];
  }
  const Index kept = stages::select_top_k<T>(score.first(count), order.first(groups.keep));
  const auto last = order.begin() + kept;
  for (std::size_t e = 0; e < key.size(); ++e) {
    const auto group = static_cast<std::int32_t>(e / block);
    if (key[e] == kNever || std::find(order.begin(), last, group) != last) continue;
    key[e] = groups.fill_zero ? T(0) : kNever;
  }
}

template <class T>
Index DeepSeekRule<T>::forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept {
  const std::size_t experts = row.logits.size();
  const std::span<T> key = row.work.first(experts), work = row.work.subspan(experts, experts);
  stages::score<T>(weighting.score, row.logits, row.prob);
  // Without a bias and groups the logits order the experts as the scores do, and do not saturate.
  const bool by_logit = buffers.selection_bias.empty() && groups.count == 1;
  stages::selection_key<T>(row.logits, by_logit ? row.logits : std::span<const T>(row.prob),
                           buffers.selection_bias, key);
  if (groups.count > 1) limit_to_groups(key, work, row.order);
  const Index count = stages::select_top_k<T>(key, row.chosen.first(k));
  stages::weigh<T>(weighting, row.logits, row.prob, row.chosen.first(count), row.gate.first(count));
  return count;
}

template <class T>
void DeepSeekRule<T>::backward(const RuleRow<T>& row, const Buffers&,
                               const RuleRowGradient<T>& d) const noexcept {
  weighted_scores_backward(weighting, row, d);
}

#ifndef MOLE_HEADER_ONLY
extern template struct DeepSeekRule<float>;
extern template struct DeepSeekRule<double>;
extern template class HeadRouter<float, LinearHead<float>, DeepSeekRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, DeepSeekRule<double>>;
#endif

static_assert(Router<DeepSeekRouter<float>>);
static_assert(Router<DeepSeekRouter<double>>);

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// GroupedRouter: the experts stand in equal groups, and every group routes on its own.
//
//   l = x Wᵀ + b (+ overrides)     group j: the experts j · E / groups ... (j + 1) · E / groups - 1
//   p = softmax of l over the group     S_j = the k largest of the group, ties to the lower expert
//   g = p on S_j, divided by its sum over S_j with renormalise, times scale
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. A token has groups · k experts,
// and prob sums to one in every group. The selection is a constant in backward. Without groups
// (one) this is a plain top-k; with k = 1 and renormalise every gate is `scale` and the router
// learns from losses.
//
// Yang et al., "M6-T: Exploring Sparse Expert Models and Beyond", 2021 (k top-1 routing, expert
// prototyping).
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct GroupedRule {
  Index groups = 1, k = 1;
  Weighting<T> weighting;

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index) const noexcept { return groups * k; }
  Index forward(const RuleRow<T>& row, None) const noexcept;
  void backward(const RuleRow<T>& row, None, const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
class GroupedRouter : public HeadRouter<T, LinearHead<T>, GroupedRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index groups = 2;  ///< divides experts
    Index k = 1;       ///< 1 ... experts of a group
    bool renormalise = false;
    T scale = T(1);
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "grouped"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("groups"), c.groups...);
      f(Field{"k"}, c.k...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"scale"}, c.scale...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit GroupedRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, GroupedRule<T>>(
            linear_head<T>("GroupedRouter", config.width, config.experts, config.bias),
            {config.groups,
             config.k,
             {Score::softmax, false, config.renormalise, T(0), config.scale}}),
        config_(config) {
    constexpr const char* kName = "GroupedRouter";
    require_field(config.groups >= 1 && config.experts % config.groups == 0, kName, "groups",
                  "a divisor of experts", config.groups);
    require_field(config.k >= 1 && config.k <= config.experts / config.groups, kName, "k",
                  "1 ... experts of a group", config.k);
    require_finite(kName, "scale", config.scale);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index GroupedRule<T>::forward(const RuleRow<T>& row, None) const noexcept {
  const std::size_t size = row.logits.size() / static_cast<std::size_t>(groups);
  Index count = 0;
  for (Index j = 0; j < groups; ++j) {
    const std::size_t first = static_cast<std::size_t>(j) * size;
    const std::span<const T> logits = row.logits.subspan(first, size);
    const std::span<T> prob = row.prob.subspan(first, size);
    const auto room =
        row.chosen.subspan(static_cast<std::size_t>(count), static_cast<std::size_t>(k));
    stages::softmax<T>(logits, prob);
    const Index found = stages::select_top_k<T>(logits, room);
    const auto chosen = room.first(static_cast<std::size_t>(found));
    stages::weigh<T>(weighting, logits, prob, chosen,
                     row.gate.subspan(static_cast<std::size_t>(count), chosen.size()));
    for (std::int32_t& e : chosen) e += static_cast<std::int32_t>(first);
    count += found;
  }
  return count;
}

template <class T>
void GroupedRule<T>::backward(const RuleRow<T>& row, None,
                              const RuleRowGradient<T>& d) const noexcept {
  const std::size_t size = row.logits.size() / static_cast<std::size_t>(groups);
  std::size_t begin = 0;
  for (Index j = 0; j < groups; ++j) {
    const std::size_t first = static_cast<std::size_t>(j) * size;
    std::size_t end = begin;
    for (; end < row.chosen.size(); ++end) {
      if (row.chosen[end] >= static_cast<std::int32_t>(first + size)) break;
      row.chosen[end] -= static_cast<std::int32_t>(first);
    }
    const RuleRow<T> group{.logits = row.logits.subspan(first, size),
                           .prob = row.prob.subspan(first, size),
                           .chosen = row.chosen.subspan(begin, end - begin),
                           .gate = row.gate.subspan(begin, end - begin),
                           .work = row.work};
    weighted_scores_backward<T>(weighting, group,
                                {d.dgate.subspan(begin, end - begin),
                                 d.dprob.subspan(first, size),
                                 d.dlogits.subspan(first, size),
                                 {}});
    begin = end;
  }
}

#ifndef MOLE_HEADER_ONLY
extern template struct GroupedRule<float>;
extern template struct GroupedRule<double>;
extern template class HeadRouter<float, LinearHead<float>, GroupedRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, GroupedRule<double>>;
#endif

static_assert(Router<GroupedRouter<float>>);
static_assert(Router<GroupedRouter<double>>);

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// GShardRouter: two experts a token, each with a capacity; first choices are placed before second
// ones.
//
//   p = softmax(x Wᵀ + b (+ overrides))     first = argmax p, second = the next, ties to the lower
//   gates(before_drop)  g_i = p_i / (p_1 + p_2 + renorm_epsilon); not formed again after dropping
//   gates(after_drop)   g_i = p_i / Σ p of the choices that were kept
//   second choices, with before_drop: all; none; threshold: g_2 > second_threshold;
//                   random: uniform < g_2 / max(second_threshold, 1e-9)
//   place of a first choice   number of first choices of its expert visited earlier
//   place of a second choice  number of second choices of its expert visited earlier, + all of its
//                             first choices
//   kept where place < capacity
//
// Tokens are visited in order, or by falling p_1 (priority gate). Tokens with mask 0 take no place
// and no expert. Shapes: x [tokens, width], W [experts, width], b [1, experts], uniform [tokens]:
// numbers in [0, 1) of the caller. Selection and dropping are constants in backward.
//
// Lepikhin et al., "GShard", 2021 (before_drop, random); NLLB (after_drop); DeepSpeed's top-2.
#pragma once

#include <array>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/capacity.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

enum class SecondChoice { all, none, threshold, random };
constexpr std::array<std::string_view, 4> enum_names(SecondChoice) noexcept {
  return {"all", "none", "threshold", "random"};
}

template <class T>
struct GShardRule {
  struct Buffers {
    std::span<const T> uniform = {};  ///< [tokens], for SecondChoice::random

    /// Inputs of one call: not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  Index capacity = 0;
  bool renormalise_before_drop = true, by_gate = false;
  SecondChoice second = SecondChoice::all;
  T second_threshold = T(0.2), renorm_epsilon = T(0);

  Index max_per_token(Index experts) const noexcept { return std::min<Index>(2, experts); }
  void check(const Buffers& buffers, Index tokens, Index experts) const;
  std::size_t scratch_bytes(Index tokens, Index experts, int workers) const noexcept;
  void forward(const RuleBatch<T>& batch, const Buffers& buffers, RoutingTable<T>& table,
               const Context& context) const;
  void backward(const RuleBatch<T>& batch, const Buffers& buffers, const Routing<T>& routing,
                const RuleBatchGradient<T>& d, const Context& context) const;

 private:
  struct Choice {
    std::int32_t expert[2] = {-1, -1};  ///< -1: none, or dropped
    T gate[2] = {};
  };
  Choice choose(const RuleBatch<T>& batch, const Buffers& buffers, Index t) const noexcept;
};

template <class T>
class GShardRouter : public HeadRouter<T, LinearHead<T>, GShardRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index capacity = 0;  ///< tokens an expert takes of one call
    bool renormalise_before_drop = true;
    SecondChoice second = SecondChoice::all;  ///< anything else needs renormalise_before_drop
    T second_threshold = T(0.2);
    T renorm_epsilon = T(0);
    bool by_gate = false;  ///< visit tokens by falling p_1 instead of in order
    bool bias = false;     ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "gshard"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("capacity"), c.capacity...);
      f(Field{"renormalise_before_drop"}, c.renormalise_before_drop...);
      f(Field{"second"}, c.second...);
      f(Field{"second_threshold"}, c.second_threshold...);
      f(Field{"renorm_epsilon"}, c.renorm_epsilon...);
      f(Field{"by_gate"}, c.by_gate...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit GShardRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, GShardRule<T>>(
            linear_head<T>("GShardRouter", config.width, config.experts, config.bias),
            {config.capacity, config.renormalise_before_drop, config.by_gate, config.second,
             config.second_threshold, config.renorm_epsilon}),
        config_(config) {
    constexpr const char* kName = "GShardRouter";
    require_field(config.capacity >= 0, kName, "capacity", "at least 0", config.capacity);
    require_field(config.renormalise_before_drop || config.second == SecondChoice::all, kName,
                  "second", "all without renormalise_before_drop", static_cast<int>(config.second));
    require_from_zero(kName, "second_threshold", config.second_threshold);
    require_from_zero(kName, "renorm_epsilon", config.renorm_epsilon);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
void GShardRule<T>::check(const Buffers& buffers, Index tokens, Index) const {
  if (second != SecondChoice::random) return;
  require(static_cast<Index>(buffers.uniform.size()) == tokens, Errc::shape_mismatch,
          "uniform: expected ", tokens, " values, got ", buffers.uniform.size());
}

template <class T>
std::size_t GShardRule<T>::scratch_bytes(Index tokens, Index experts, int workers) const noexcept {
  ByteCounter counter;
  counter.take<std::int32_t>(experts);
  counter.take<std::int32_t>(experts);
  counter.take<std::int32_t>(tokens);
  counter.take<Choice>(tokens);
  return counter.bytes() + stages::softmax_gates_backward_bytes(experts, workers);
}

template <class T>
auto GShardRule<T>::choose(const RuleBatch<T>& batch, const Buffers& buffers,
                           Index t) const noexcept -> Choice {
  Choice choice;
  if (!batch.tokens.mask.empty() && batch.tokens.mask[t] == 0) return choice;
  const Index found = stages::select_top_k<T>(
      batch.logits.row(t),
      std::span(choice.expert).first(static_cast<std::size_t>(max_per_token(batch.logits.cols))));
  for (Index i = 0; i < found; ++i) choice.gate[i] = batch.prob(t, choice.expert[i]);
  if (!renormalise_before_drop) return choice;
  const T sum = choice.gate[0] + choice.gate[1] + renorm_epsilon;
  for (T& gate : choice.gate) gate /= sum == T(0) ? T(1) : sum;
  const T g = choice.gate[1];
  const bool kept = second == SecondChoice::all ||
                    (second == SecondChoice::threshold && g > second_threshold) ||
                    (second == SecondChoice::random &&
                     buffers.uniform[t] < g / std::max(second_threshold, T(1e-9)));
  if (!kept) choice.expert[1] = -1;
  return choice;
}

template <class T>
void GShardRule<T>::forward(const RuleBatch<T>& batch, const Buffers& buffers,
                            RoutingTable<T>& table, const Context& context) const {
  const Index count = batch.logits.rows, experts = batch.logits.cols;
  stages::softmax_rows<T>(batch.logits, batch.prob, context);
  const Workspace::Frame frame(context.scratch);
  const auto order = context.scratch.take<std::int32_t>(count);
  const auto choices = context.scratch.take<Choice>(count);
  for (Index t = 0; t < count; ++t) {
    order[t] = static_cast<std::int32_t>(t);
    choices[t] = choose(batch, buffers, t);
  }
  const auto largest = [&](std::int32_t t) {
    return *std::max_element(batch.prob.row(t).begin(), batch.prob.row(t).end());
  };
  if (by_gate) {
    std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      const T one = largest(a), other = largest(b);
      return one > other || (one == other && a < b);
    });
  }
  // `used` goes on from the first choices to the second ones: the places of the latter follow.
  const auto used = context.scratch.take<std::int32_t>(experts);
  std::fill(used.begin(), used.end(), 0);
  for (const int rank : {0, 1}) {
    for (const std::int32_t t : order) {
      std::int32_t& e = choices[t].expert[rank];
      if (e >= 0 && used[e]++ >= capacity) e = -1;
    }
  }
  for (Index t = 0; t < count; ++t) {
    std::int32_t kept[2];
    T gate[2], sum = T(0);
    std::size_t slots = 0;
    for (const int rank : {0, 1}) {
      if (choices[t].expert[rank] < 0) continue;
      kept[slots] = choices[t].expert[rank];
      gate[slots++] = choices[t].gate[rank];
      sum += choices[t].gate[rank];
    }
    if (!renormalise_before_drop && sum > T(0)) {
      for (std::size_t i = 0; i < slots; ++i) gate[i] /= sum;
    }
    table.select(t, std::span(kept).first(slots), std::span<const T>(gate).first(slots));
  }
}

template <class T>
void GShardRule<T>::backward(const RuleBatch<T>& batch, const Buffers&, const Routing<T>& routing,
                             const RuleBatchGradient<T>& d, const Context& context) const {
  const auto body = [this](const stages::SoftmaxGatesRow<T>& row) {
    if (!renormalise_before_drop) return stages::add_shares<T>(row);
    if (row.chosen.empty()) return;
    const auto experts = static_cast<Index>(row.logits.size());
    stages::add_shares_of_best<T>(row, max_per_token(experts), renorm_epsilon);
  };
  stages::softmax_gates_backward<T>(batch.logits, batch.prob, routing, d.dgate, d.dprob, d.dlogits,
                                    context, body);
}

#ifndef MOLE_HEADER_ONLY
extern template struct GShardRule<float>;
extern template struct GShardRule<double>;
extern template class HeadRouter<float, LinearHead<float>, GShardRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, GShardRule<double>>;
#endif

static_assert(Router<GShardRouter<float>>);
static_assert(Router<GShardRouter<double>>);

}  // namespace mole::inline MOLE_ABI

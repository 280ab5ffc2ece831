// SPDX-License-Identifier: Apache-2.0
// TopKCapacityRouter: top-k, and an expert with more tokens than its capacity drops some.
//
//   p = softmax(x Wᵀ + b (+ overrides))     S = the k largest, ties to the lower expert
//   g = p on S, or softmax of the logits over S (over_selection)
//   each expert keeps `capacity` of its tokens: those with the largest g (drop by score), the first
//   ones (drop by position), those with the largest numbers of the caller (drop at random)
//   renormalise: g / Σ g over what the token kept; a sum of 0 leaves 0
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts], uniform [tokens, experts] in [0,
// 1). Ties go to the earlier token. Selection and dropping are constants in backward.
//
// Megatron-LM: capacity = ceil(tokens k / experts · factor). DeepSpeed: max(min_capacity,
// ceil(tokens / experts · factor · k)), without the k for top-1.
#pragma once

#include <array>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/capacity.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

enum class DropBy { score, position, random };
constexpr std::array<std::string_view, 3> enum_names(DropBy) noexcept {
  return {"score", "position", "random"};
}

template <class T>
struct TopKCapacityRule {
  struct Buffers {
    MatView<const T> uniform = {};  ///< [tokens, experts], for DropBy::random

    /// Inputs of one call: not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  Index k = 1, capacity = 0;
  bool over_selection = false, renormalise = false;
  DropBy drop = DropBy::score;

  Index max_per_token(Index) const noexcept { return k; }
  void check(const Buffers& buffers, Index tokens, Index experts) const;
  std::size_t scratch_bytes(Index tokens, Index experts, int workers) const noexcept;
  void forward(const RuleBatch<T>& batch, const Buffers& buffers, RoutingTable<T>& table,
               const Context& context) const;
  void backward(const RuleBatch<T>& batch, const Buffers& buffers, const Routing<T>& routing,
                const RuleBatchGradient<T>& d, const Context& context) const;
};

template <class T>
class TopKCapacityRouter : public HeadRouter<T, LinearHead<T>, TopKCapacityRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 2;         ///< 1 ... experts
    Index capacity = 0;  ///< tokens an expert takes of one call
    bool over_selection = false;
    bool renormalise = false;
    DropBy drop = DropBy::score;
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "top_k_capacity"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field::required("capacity"), c.capacity...);
      f(Field{"over_selection"}, c.over_selection...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"drop"}, c.drop...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit TopKCapacityRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, TopKCapacityRule<T>>(
            linear_head<T>("TopKCapacityRouter", config.width, config.experts, config.bias),
            {config.k, config.capacity, config.over_selection, config.renormalise, config.drop}),
        config_(config) {
    require_k("TopKCapacityRouter", config.k, config.experts);
    require_field(config.capacity >= 0, "TopKCapacityRouter", "capacity", "at least 0",
                  config.capacity);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
void TopKCapacityRule<T>::check(const Buffers& buffers, Index tokens, Index experts) const {
  if (drop == DropBy::random) require_shape("uniform", buffers.uniform, tokens, experts);
}

template <class T>
std::size_t TopKCapacityRule<T>::scratch_bytes(Index tokens, Index experts,
                                               int workers) const noexcept {
  ByteCounter counter;
  counter.take<std::int32_t>(tokens, k);
  counter.take<T>(tokens, k);
  counter.take<std::int32_t>(tokens);
  counter.take<T>(tokens);
  return counter.bytes() + stages::softmax_gates_backward_bytes(experts, workers);
}

template <class T>
void TopKCapacityRule<T>::forward(const RuleBatch<T>& batch, const Buffers& buffers,
                                  RoutingTable<T>& table, const Context& context) const {
  const Index count = batch.logits.rows, experts = batch.logits.cols;
  stages::softmax_rows<T>(batch.logits, batch.prob, context);
  const Workspace::Frame frame(context.scratch);
  const auto chosen = context.scratch.take<std::int32_t>(count, k);  // -1: none, or dropped
  const auto gate = context.scratch.template take<T>(count, k);
  const Weighting<T> weighting{Score::softmax, over_selection, false, T(0), T(1)};
  for (Index t = 0; t < count; ++t) {
    const Index found = stages::select_top_k<T>(batch.logits.row(t), chosen.row(t));
    const auto slots = static_cast<std::size_t>(found);
    stages::weigh<T>(weighting, batch.logits.row(t), batch.prob.row(t), chosen.row(t).first(slots),
                     gate.row(t).first(slots));
    std::fill(chosen.row(t).begin() + found, chosen.row(t).end(), -1);
  }
  const auto order = context.scratch.take<std::int32_t>(count);
  const auto key = context.scratch.template take<T>(count);
  for (Index e = 0; e < experts; ++e) {
    Index asked = 0;
    for (Index t = 0; t < count; ++t) {
      const auto place = std::find(chosen.row(t).begin(), chosen.row(t).end(), e);
      if (place == chosen.row(t).end()) continue;
      order[asked++] = static_cast<std::int32_t>(t);
      key[t] = drop == DropBy::score    ? gate(t, place - chosen.row(t).begin())
               : drop == DropBy::random ? buffers.uniform(t, e)
                                        : T(0);
    }
    if (asked <= capacity) continue;
    std::sort(order.begin(), order.begin() + asked, [&](std::int32_t a, std::int32_t b) {
      return key[a] > key[b] || (key[a] == key[b] && a < b);
    });
    for (Index i = capacity; i < asked; ++i) {
      std::replace(chosen.row(order[i]).begin(), chosen.row(order[i]).end(),
                   static_cast<std::int32_t>(e), std::int32_t{-1});
    }
  }
  for (Index t = 0; t < count; ++t) {
    std::size_t slots = 0;
    T sum = T(0);
    for (Index i = 0; i < k; ++i) {
      if (chosen(t, i) < 0) continue;
      sum += gate(t, i);
      chosen(t, static_cast<Index>(slots)) = chosen(t, i);
      gate(t, static_cast<Index>(slots++)) = gate(t, i);
    }
    const std::span<T> gates = gate.row(t).first(slots);
    if (renormalise && sum > T(0)) {
      for (T& g : gates) g /= sum;
    }
    table.select(t, chosen.row(t).first(slots), gates);
  }
}

template <class T>
void TopKCapacityRule<T>::backward(const RuleBatch<T>& batch, const Buffers&,
                                   const Routing<T>& routing, const RuleBatchGradient<T>& d,
                                   const Context& context) const {
  const auto body = [this](const stages::SoftmaxGatesRow<T>& row) {
    if (renormalise) return stages::add_shares<T>(row);
    if (!over_selection) return stages::add_scores<T>(row);
    stages::add_shares_of_best<T>(row, k, T(0));
  };
  stages::softmax_gates_backward<T>(batch.logits, batch.prob, routing, d.dgate, d.dprob, d.dlogits,
                                    context, body);
}

#ifndef MOLE_HEADER_ONLY
extern template struct TopKCapacityRule<float>;
extern template struct TopKCapacityRule<double>;
extern template class HeadRouter<float, LinearHead<float>, TopKCapacityRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, TopKCapacityRule<double>>;
#endif

static_assert(Router<TopKCapacityRouter<float>>);
static_assert(Router<TopKCapacityRouter<double>>);

}  // namespace mole::inline MOLE_ABI

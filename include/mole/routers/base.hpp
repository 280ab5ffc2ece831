// SPDX-License-Identifier: Apache-2.0
// BaseRouter: while training, every token has one expert and no expert more than its share.
//
//   l = x Wᵀ + b (+ overrides)      p = σ(l)      share = ⌈tokens / experts⌉
//   training   pairs (t, e) by falling l_te, ties to the earlier token, then to the lower expert;
//              a pair is taken if t has no expert yet and e fewer tokens than the share
//   inference  the largest l of the row, ties to the lower expert
//   g = p of the expert
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. A token whose available experts
// are all full has no slot; one with mask 0 has none and is not counted. The assignment is a
// constant in backward.
//
// Lewis et al., "BASE Layers: Simplifying Training of Large, Sparse Models", ICML 2021. There an
// auction finds the assignment with the largest sum of scores; here it is the greedy one. The gate
// is that of the released code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/capacity.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct BaseRule {
  struct Buffers {
    bool balance = true;  ///< share the tokens out; false: as at inference

    /// Inputs of one call: not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  Index max_per_token(Index) const noexcept { return 1; }
  std::size_t scratch_bytes(Index tokens, Index experts, int workers) const noexcept;
  void forward(const RuleBatch<T>& batch, const Buffers& buffers, RoutingTable<T>& table,
               const Context& context) const;
  void backward(const RuleBatch<T>& batch, const Buffers& buffers, const Routing<T>& routing,
                const RuleBatchGradient<T>& d, const Context& context) const;

 private:
  struct Scratch {
    std::span<std::int32_t> expert;   // [tokens], -1: none
    std::span<std::int32_t> waiting;  // [tokens], a heap
    std::span<Index> room;            // [experts]
  };
  template <class Arena>
  static Scratch take_scratch(Arena& arena, Index tokens, Index experts) {
    return {arena.template take<std::int32_t>(tokens), arena.template take<std::int32_t>(tokens),
            arena.template take<Index>(experts)};
  }
  static std::int32_t best_with_room(std::span<const T> logits,
                                     std::span<const Index> room) noexcept;
  static void assign(const RuleBatch<T>& batch, bool balance, const Scratch& scratch) noexcept;
};

template <class T>
class BaseRouter : public HeadRouter<T, LinearHead<T>, BaseRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "base"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit BaseRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, BaseRule<T>>(
            linear_head<T>("BaseRouter", config.width, config.experts, config.bias), {}),
        config_(config) {}

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
std::size_t BaseRule<T>::scratch_bytes(Index tokens, Index experts, int) const noexcept {
  ByteCounter counter;
  take_scratch(counter, tokens, experts);
  return counter.bytes();
}

template <class T>
std::int32_t BaseRule<T>::best_with_room(std::span<const T> logits,
                                         std::span<const Index> room) noexcept {
  std::int32_t best = -1;
  T largest = -std::numeric_limits<T>::infinity();  // an expert that is not available
  for (std::size_t e = 0; e < logits.size(); ++e) {
    if (room[e] == 0 || !(logits[e] > largest)) continue;
    best = static_cast<std::int32_t>(e);
    largest = logits[e];
  }
  return best;
}

// Every waiting token stands for its best pair whose expert has room, or had when it was looked up:
// the first in the heap is looked up again if its expert has filled up since.
template <class T>
void BaseRule<T>::assign(const RuleBatch<T>& batch, bool balance, const Scratch& scratch) noexcept {
  const auto& [expert, waiting, room] = scratch;
  const std::span<const std::uint8_t> mask = batch.tokens.mask;
  const Index count = batch.logits.rows, experts = batch.logits.cols;
  Index real = 0;
  for (Index t = 0; t < count; ++t) real += mask.empty() || mask[t] != 0;
  std::fill(room.begin(), room.end(), balance ? (real + experts - 1) / experts : Index{1});
  auto end = waiting.begin();
  for (Index t = 0; t < count; ++t) {
    const bool takes_part = mask.empty() || mask[t] != 0;
    expert[t] = takes_part ? best_with_room(batch.logits.row(t), room) : -1;
    if (expert[t] >= 0) *end++ = static_cast<std::int32_t>(t);
  }
  if (!balance) return;
  const auto comes_later = [&](std::int32_t a, std::int32_t b) {
    const T of_a = batch.logits(a, scratch.expert[a]), of_b = batch.logits(b, scratch.expert[b]);
    return of_a < of_b || (of_a == of_b && a > b);
  };
  std::make_heap(waiting.begin(), end, comes_later);
  while (end != waiting.begin()) {
    std::pop_heap(waiting.begin(), end, comes_later);
    const std::int32_t t = *(end - 1);
    if (room[expert[t]] > 0) {
      --room[expert[t]];
      --end;
      continue;
    }
    expert[t] = best_with_room(batch.logits.row(t), room);
    if (expert[t] < 0) {
      --end;
    } else {
      std::push_heap(waiting.begin(), end, comes_later);
    }
  }
}

template <class T>
void BaseRule<T>::forward(const RuleBatch<T>& batch, const Buffers& buffers, RoutingTable<T>& table,
                          const Context& context) const {
  const Index count = batch.logits.rows;
  const Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, count, batch.logits.cols);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      stages::score<T>(Score::sigmoid, batch.logits.row(t), batch.prob.row(t));
    }
  });
  assign(batch, buffers.balance, scratch);
  for (Index t = 0; t < count; ++t) {
    const std::int32_t e = scratch.expert[t];
    const std::size_t slots = e < 0 ? 0 : 1;
    const T gate = slots == 0 ? T(0) : batch.prob(t, e);
    table.select(t, std::span(&e, slots), std::span(&gate, slots));
  }
}

template <class T>
void BaseRule<T>::backward(const RuleBatch<T>& batch, const Buffers&, const Routing<T>& routing,
                           const RuleBatchGradient<T>& d, const Context& context) const {
  stages::sigmoid_gates_backward<T>(batch.logits, batch.prob, routing, d.dgate, d.dprob, d.dlogits,
                                    context);
}

#ifndef MOLE_HEADER_ONLY
extern template struct BaseRule<float>;
extern template struct BaseRule<double>;
extern template class HeadRouter<float, LinearHead<float>, BaseRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, BaseRule<double>>;
#endif

static_assert(Router<BaseRouter<float>>);
static_assert(Router<BaseRouter<double>>);

}  // namespace mole::inline MOLE_ABI

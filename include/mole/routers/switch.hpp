// SPDX-License-Identifier: Apache-2.0
// SwitchRouter: one expert a token, and no expert takes more than its capacity.
//
//   p = softmax(x Wᵀ + b (+ overrides))      e = argmax p, ties to the lower expert
//   position = number of earlier tokens of the same sequence with the same e
//   g_e = p_e where position < capacity; a token beyond it is dropped: it has no slot
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]. Selection and dropping are
// constants in backward. A dropped token keeps its scores in the tape.
//
// Fedus et al., "Switch Transformers", 2022; capacity by sequence as in the transformers library.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/capacity.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct SwitchRule {
  Index capacity = 0;

  static constexpr Scope scope = Scope::sequence;
  Index max_per_token(Index) const noexcept { return 1; }
  std::size_t scratch_bytes(Index tokens, Index experts, int workers) const noexcept;
  void forward(const RuleBatch<T>& batch, None, RoutingTable<T>& table,
               const Context& context) const;
  void backward(const RuleBatch<T>& batch, None, const Routing<T>& routing,
                const RuleBatchGradient<T>& d, const Context& context) const;
};

template <class T>
class SwitchRouter : public HeadRouter<T, LinearHead<T>, SwitchRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index capacity = 0;  ///< tokens an expert takes of one sequence; 0: none
    bool bias = false;   ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "switch"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("capacity"), c.capacity...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit SwitchRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, SwitchRule<T>>(
            linear_head<T>("SwitchRouter", config.width, config.experts, config.bias),
            {config.capacity}),
        config_(config) {
    require_field(config.capacity >= 0, "SwitchRouter", "capacity", "at least 0", config.capacity);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
std::size_t SwitchRule<T>::scratch_bytes(Index, Index experts, int workers) const noexcept {
  ByteCounter counter;
  counter.take<std::int32_t>(experts);
  return counter.bytes() + stages::softmax_gates_backward_bytes(experts, workers);
}

template <class T>
void SwitchRule<T>::forward(const RuleBatch<T>& batch, None, RoutingTable<T>& table,
                            const Context& context) const {
  stages::softmax_rows<T>(batch.logits, batch.prob, context);
  const Workspace::Frame frame(context.scratch);
  const std::span<std::int32_t> used = context.scratch.take<std::int32_t>(batch.logits.cols);
  for_each_sequence(batch.tokens, [&](Index begin, Index end) {
    std::fill(used.begin(), used.end(), 0);
    for (Index t = begin; t < end; ++t) {
      std::int32_t best[1];
      if (stages::select_top_k<T>(batch.logits.row(t), best) == 0) continue;
      T gate[1] = {batch.prob(t, best[0])};
      if (stages::limit_capacity<T>(capacity, used, best, gate) == 1) table.select(t, best, gate);
    }
  });
}

template <class T>
void SwitchRule<T>::backward(const RuleBatch<T>& batch, None, const Routing<T>& routing,
                             const RuleBatchGradient<T>& d, const Context& context) const {
  stages::softmax_gates_backward<T>(batch.logits, batch.prob, routing, d.dgate, d.dprob, d.dlogits,
                                    context, stages::add_scores<T>);
}

#ifndef MOLE_HEADER_ONLY
extern template struct SwitchRule<float>;
extern template struct SwitchRule<double>;
extern template class HeadRouter<float, LinearHead<float>, SwitchRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, SwitchRule<double>>;
#endif

static_assert(Router<SwitchRouter<float>>);
static_assert(Router<SwitchRouter<double>>);

}  // namespace mole::inline MOLE_ABI

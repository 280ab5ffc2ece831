// SPDX-License-Identifier: Apache-2.0
// PassThrough: a mixture past which the tokens go that no expert took.
//
//   y_t += mixture(x_t)             for a token with a slot
//   y_t += max_e p_te · x_t         for one without: dropped by a capacity, or with nobody to go to
//
//   x, y [tokens, width]   p [tokens, experts], the scores in the router's tape
//
// With SwitchRouter and feed-forward experts it is MoE-PEFT's mixlora-switch. Ties of the largest
// score go to the lower expert. Dropout acts on the experts' x alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/workspace.hpp"
#include "mole/kernels/gated_low_rank.hpp"
#include "mole/layers/mixture.hpp"

namespace mole::inline MOLE_ABI {

template <class M>
class PassThrough {
 public:
  using Scalar = typename M::Scalar;
  using T = Scalar;
  using Buffers = typename M::Buffers;
  template <class V>
  using Carry = typename M::template Carry<V>;
  template <class V>
  using Params = typename M::template Params<V>;
  using Weights = typename M::Weights;
  using Prepared = typename M::Prepared;
  using RouterTape = typename M::RouterTape;
  using ExpertTape = typename M::ExpertTape;
  using Tape = typename M::Tape;
  static constexpr bool needs_base = M::needs_base;

  /// Throws shape_mismatch unless the mixture is as wide at its input as at its output, unsupported
  /// if its router keeps no scores.
  explicit PassThrough(M mixture);

  const auto& router() const noexcept { return mixture_.router(); }
  const auto& experts() const noexcept { return mixture_.experts(); }
  Index input_width() const noexcept { return mixture_.input_width(); }
  Index output_width() const noexcept { return mixture_.output_width(); }

  std::size_t prepared_bytes() const noexcept { return mixture_.prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept {
    return mixture_.scratch_bytes(max_tokens, workers) + router().tape_bytes(max_tokens);
  }
  std::size_t tape_bytes(Index max_tokens) const noexcept {
    return mixture_.tape_bytes(max_tokens);
  }
  Prepared prepare(const Weights& weights, Workspace& memory) const {
    return mixture_.prepare(weights, memory);
  }
  Tape make_tape(Workspace& memory, Index max_tokens) const {
    return mixture_.make_tape(memory, max_tokens);
  }

  /// Adds into y. `tape` null is inference. Throws what the mixture throws.
  void forward(const Prepared& prepared, const Buffers& buffers, const LayerInput<T>& input,
               const Carry<const T>& carry_in, MatView<T> y, const Carry<T>& carry_out, Tape* tape,
               const Context& context) const;

  /// As Mixture::backward; what passes through also adds into d_tape.prob.
  void backward(const Weights& weights, const Buffers& buffers, const Tape& saved,
                const LayerInput<T>& input, const Carry<const T>& carry_in, MatView<const T> dy,
                const RouterTape& d_tape, const Carry<T>& d_carry_out,
                const LayerInputGradient<T>& d_input, const Params<T>& grad,
                const Carry<T>& d_carry_in, const Context& context) const;

 private:
  static bool is_left_out(const Routing<T>& routing, Index t) noexcept {
    return routing.token_begin[t] == routing.token_begin[t + 1];
  }
  static Index best(MatView<const T> prob, Index t) noexcept {
    const std::span<const T> row = prob.row(t);
    return std::max_element(row.begin(), row.end()) - row.begin();
  }

  M mixture_;
};

template <class M>
PassThrough<M>::PassThrough(M mixture) : mixture_(std::move(mixture)) {
  require(input_width() == output_width(), Errc::shape_mismatch, "PassThrough: the mixture is ",
          input_width(), " wide at its input and ", output_width(), " at its output");
  Buffer block(router().tape_bytes(1));
  Workspace memory(block.span());
  require(router().make_tape(memory, 1).prob.rows > 0, Errc::unsupported,
          "PassThrough: the router keeps no scores of the experts, by which tokens pass");
}

template <class M>
void PassThrough<M>::forward(const Prepared& prepared, const Buffers& buffers,
                             const LayerInput<T>& input, const Carry<const T>& carry_in,
                             MatView<T> y, const Carry<T>& carry_out, Tape* tape,
                             const Context& context) const {
  Workspace::Frame frame(context.scratch);
  RouterTape router_tape;
  RoutingTable<T> scratch_table;
  if (tape == nullptr) {
    router_tape = router().make_tape(context.scratch, input.x.rows);
    scratch_table = mixture_.make_table(context.scratch, input.x.rows);
  } else {
    router_tape = tape->router;
  }
  RoutingTable<T>& table = tape != nullptr ? tape->routing : scratch_table;
  mixture_.route(prepared, buffers, input, carry_in, table, carry_out, &router_tape, context);
  const Routing<T> routing = table.view();
  mixture_.apply(prepared, input, routing, y, tape != nullptr ? &tape->experts : nullptr, context);
  for (Index t = 0; t < routing.tokens; ++t) {
    if (!is_left_out(routing, t)) continue;
    const T p = router_tape.prob(t, best(router_tape.prob, t));
    for (Index i = 0; p != T(0) && i < y.cols; ++i) y(t, i) = std::fma(p, input.x(t, i), y(t, i));
  }
}

template <class M>
void PassThrough<M>::backward(const Weights& weights, const Buffers& buffers, const Tape& saved,
                              const LayerInput<T>& input, const Carry<const T>& carry_in,
                              MatView<const T> dy, const RouterTape& d_tape,
                              const Carry<T>& d_carry_out, const LayerInputGradient<T>& d_input,
                              const Params<T>& grad, const Carry<T>& d_carry_in,
                              const Context& context) const {
  const Routing<T> routing = saved.routing.view();
  const Index count = routing.tokens;
  require(d_tape.prob.rows >= count && d_tape.prob.cols == routing.experts, Errc::shape_mismatch,
          "d_tape.prob: expected [", count, ", ", routing.experts, "], got [", d_tape.prob.rows,
          ", ", d_tape.prob.cols, "]");
  mixture_.check_backward(weights, saved, input, dy, d_tape, d_input, grad, context);
  const MatView<const T> prob = saved.router.prob;
  const auto passes = [&](Index t, Index e) {
    return is_left_out(routing, t) && prob(t, e) != T(0);
  };
  for (Index t = 0; t < count; ++t) {
    const Index e = best(prob, t);
    if (passes(t, e)) d_tape.prob(t, e) += gated::dot<T>(dy.row(t), input.x.row(t));
  }
  mixture_.backward(weights, buffers, saved, input, carry_in, dy, d_tape, d_carry_out, d_input,
                    grad, d_carry_in, context);
  for (Index t = 0; d_input.x.data != nullptr && t < count; ++t) {
    const Index e = best(prob, t);
    for (Index i = 0; passes(t, e) && i < dy.cols; ++i) {
      d_input.x(t, i) = std::fma(prob(t, e), dy(t, i), d_input.x(t, i));
    }
  }
}

}  // namespace mole::inline MOLE_ABI

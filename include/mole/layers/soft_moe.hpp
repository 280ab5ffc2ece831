// SPDX-License-Identifier: Apache-2.0
// SoftMoe: Soft MoE. Experts work on slots, means of the tokens, instead of on tokens; nothing is
// dropped, nothing is chosen. For each sequence on its own, with p slots an expert:
//
//   L = X Φᵀ      D = softmax of every column of L, over the tokens      X̃ = Dᵀ X
//   Ỹ_s = f_⌊s/p⌋(X̃_s)      C = softmax of every row of L, over the slots      Y += C Ỹ
//
// With `normalise` L = scale · X̂ Φ̂ᵀ, rows over √(Σ² + epsilon), the scale learned (soft_slots.hpp):
// the paper's for large widths, and what its code always does.
//
// Shapes: X [tokens, in], Φ [experts · p, in], scale [1, 1], L, D, C [tokens, experts · p], X̃
// [experts · p, in], Ỹ [experts · p, out], Y [tokens, out]; f any bank.
//
// Not causal: every token sees all tokens of its sequence, later ones too. Sequences do not see
// each other, nor padding (mask 0), nor tokens whose logits are not finite; such a token keeps its
// y.
//
// Puigcerver et al., "From Sparse to Soft Mixtures of Experts", ICLR 2024.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/layers/layer_input.hpp"
#include "mole/layers/soft_slots.hpp"
#include "mole/routing/head.hpp"
#include "mole/routing/pool.hpp"

namespace mole::inline MOLE_ABI {

/// Bank: the parameters of the experts.
template <class V, class Bank>
struct SoftMoeParams {
  SoftSlotsParams<V> slots;  ///< Φ and scale
  Bank experts;

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    SoftSlotsParams<V>::visit(f, p.slots...);
    visit_group<Bank>(Leaf{"experts"}, f, p.experts...);
  }
};

template <ExpertBank B>
class SoftMoe {
  static_assert(!B::needs_base, "a slot has no base product");

 public:
  using Scalar = typename B::Scalar;
  using T = Scalar;
  using Buffers = None;
  template <class V>
  using Carry = None;
  template <class V>
  using Params = SoftMoeParams<V, typename B::template Params<V>>;
  using Weights = SoftMoeParams<const T, typename B::Weights>;

  struct Config {
    Index slots = 1;          ///< of an expert, p
    Index max_sequences = 1;  ///< with tokens, in one call
    bool normalise = false;
    double epsilon = 1e-6;

    static constexpr std::string_view kind() noexcept { return "soft_moe"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field{"slots"}, c.slots...);
      f(Field{"max_sequences"}, c.max_sequences...);
      f(Field{"normalise"}, c.normalise...);
      f(Field{"epsilon"}, c.epsilon...);
    }
  };

  struct Prepared {
    typename SoftSlots<T>::Prepared slots;
    typename B::Prepared experts;
  };

  /// Rows by slot: those of the first sequence with a token, of the next one, ...
  struct Rows {
    typename SoftSlots<T>::Assignment found;
    MatView<T> merged;        ///< [sequences · experts · p, in], X̃
    MatView<T> worked;        ///< [sequences · experts · p, out], Ỹ
    RoutingTable<T> routing;  ///< the expert of every row, with gate 1
  };
  struct Tape : Rows {
    typename B::Tape experts;
  };

  /// What programs that hold any layer ask: a token may have a part in every expert.
  struct Shares {
    Index count = 0;
    Index experts() const noexcept { return count; }
    Index max_per_token() const noexcept { return count; }
  };

  /// Throws invalid_argument, naming the field.
  SoftMoe(B experts, const Config& config);

  const Config& config() const noexcept { return config_; }
  const B& experts() const noexcept { return experts_; }
  Shares router() const noexcept { return {experts_.experts()}; }
  Index input_width() const noexcept { return experts_.input_width(); }
  Index output_width() const noexcept { return experts_.output_width(); }
  Index total_slots() const noexcept { return slots_.slots; }

  std::size_t params_bytes() const noexcept;
  Params<T> make_params(Workspace& memory) const;
  std::size_t prepared_bytes() const noexcept {
    return slots_.prepared_bytes() + experts_.prepared_bytes();
  }
  /// Throws shape_mismatch, naming the member.
  Prepared prepare(const Weights& weights, Workspace& memory) const {
    return {slots_.prepare(weights.slots, memory), experts_.prepare(weights.experts, memory)};
  }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;
  Tape make_tape(Workspace& memory, Index max_tokens) const;

  /// Adds into y. Of `input` x, sequence_begin and mask are read; overrides, dropout, base and
  /// router_x are refused. `tape` null is inference. Throws shape_mismatch, invalid_argument, or
  /// limit_exceeded for more sequences with tokens than max_sequences; y is as it was then.
  void forward(const Prepared& prepared, const LayerInput<T>& input, MatView<T> y, Tape* tape,
               const Context& context) const;

  /// Adds into dx and grad, whose members may be empty.
  void backward(const Weights& weights, const Tape& tape, const LayerInput<T>& input,
                MatView<const T> dy, MatView<T> dx, const Params<T>& grad,
                const Context& context) const;

  RoutingTable<T> make_table(Workspace& memory, Index max_tokens) const {
    return RoutingTable<T>(memory, max_tokens, experts_.experts(), experts_.experts());
  }
  /// The two halves of a layer with a router, for AnyLayer. The gates are what the experts have in
  /// a token, sums of C over their slots; `apply` does the work without them.
  void route(const Prepared& prepared, None, const LayerInput<T>& input, None,
             RoutingTable<T>& table, None, std::nullptr_t, const Context& context) const;
  void apply(const Prepared& prepared, const LayerInput<T>& input, const Routing<T>& routing,
             MatView<T> y, std::nullptr_t, const Context& context) const {
    require(routing.tokens == input.x.rows, Errc::shape_mismatch, "routing: expected ",
            input.x.rows, " tokens, got ", routing.tokens);
    forward(prepared, input, y, nullptr, context);
  }

 private:
  /// Slots of that many sequences or tokens, whichever are fewer.
  Index slot_rows(Index sequences, Index tokens) const noexcept {
    return saturating_product(std::min(sequences, tokens), total_slots());
  }
  template <class Arena>
  Rows take_rows(Arena& arena, Index tokens, Index sequences) const;
  RoutingTable<T> make_slot_table(Workspace& memory, Index rows) const {
    return RoutingTable<T>(memory, rows, experts_.experts(), 1);
  }
  /// Checks what forward and route read; how many sequences have tokens.
  Index check_input(const LayerInput<T>& input) const;
  MatView<T> of_sequence(MatView<T> rows, Index sequence) const noexcept {
    return rows.row_block(sequence * total_slots(), total_slots());
  }
  /// The experts of the slots of so many sequences.
  Routing<T> share_out(RoutingTable<T>& table, Index sequences) const;

  B experts_;
  Config config_;
  SoftSlots<T> slots_;
};

template <ExpertBank B>
SoftMoe<B>::SoftMoe(B experts, const Config& config)
    : experts_(std::move(experts)), config_(config) {
  constexpr const char* kName = "SoftMoe";
  constexpr Index kLimit = Index{1} << 31;
  require_field(config.slots >= 1 && config.slots <= kLimit / experts_.experts(), kName, "slots",
                "at least 1 and at most 2^31 in all", config.slots);
  require_count(kName, "max_sequences", config.max_sequences);
  require_from_zero(kName, "epsilon", config.epsilon);
  slots_ = {input_width(), experts_.experts() * config.slots, config.normalise, config.epsilon};
}

template <ExpertBank B>
std::size_t SoftMoe<B>::params_bytes() const noexcept {
  ByteCounter counter;
  slots_.take_params(counter);
  return counter.bytes() + experts_.template params_bytes<T>();
}

template <ExpertBank B>
auto SoftMoe<B>::make_params(Workspace& memory) const -> Params<T> {
  return {slots_.take_params(memory), experts_.template make_params<T>(memory)};
}

template <ExpertBank B>
template <class Arena>
auto SoftMoe<B>::take_rows(Arena& arena, Index tokens, Index sequences) const -> Rows {
  const Index rows = slot_rows(sequences, tokens);
  Rows made;
  made.found = slots_.take_assignment(arena, tokens, std::min(sequences, tokens));
  made.merged = arena.template take<T>(rows, input_width());
  made.worked = arena.template take<T>(rows, output_width());
  return made;
}

template <ExpertBank B>
std::size_t SoftMoe<B>::tape_bytes(Index max_tokens) const noexcept {
  const Index rows = slot_rows(config_.max_sequences, max_tokens);
  ByteCounter counter;
  take_rows(counter, max_tokens, config_.max_sequences);
  return counter.bytes() + RoutingTable<T>::bytes(rows, experts_.experts(), 1) +
         experts_.tape_bytes(rows, rows);
}

template <ExpertBank B>
auto SoftMoe<B>::make_tape(Workspace& memory, Index max_tokens) const -> Tape {
  const Index rows = slot_rows(config_.max_sequences, max_tokens);
  Tape tape;
  static_cast<Rows&>(tape) = take_rows(memory, max_tokens, config_.max_sequences);
  tape.routing = make_slot_table(memory, rows);
  tape.experts = experts_.make_tape(memory, rows, rows);
  return tape;
}

template <ExpertBank B>
std::size_t SoftMoe<B>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  const Index rows = slot_rows(config_.max_sequences, max_tokens);
  ByteCounter ahead, back;
  take_rows(ahead, max_tokens, config_.max_sequences);
  ahead.take<T>(experts_.experts());
  back.take<T>(rows, input_width());
  back.take<T>(rows, output_width());
  back.take<T>(rows);
  back.take<T>(max_tokens, total_slots());
  back.take<T>(max_tokens, total_slots());
  back.take<T>(total_slots(), std::max(input_width(), output_width()));
  return std::max(ahead.bytes() + RoutingTable<T>::bytes(rows, experts_.experts(), 1),
                  back.bytes()) +
         slots_.scratch_bytes(max_tokens, workers) + experts_.scratch_bytes(rows, rows, workers);
}

template <ExpertBank B>
Index SoftMoe<B>::check_input(const LayerInput<T>& input) const {
  require_shape("x", input.x, input.x.rows, input_width());
  check_tokens(input.tokens());
  const auto unread = [](bool given, const char* name) {
    require(!given, Errc::invalid_argument, "SoftMoe: ", name, ": expected none, it is not read");
  };
  unread(input.router_x.data != nullptr, "router_x");
  unread(input.base.data != nullptr, "base");
  unread(input.dropout.data != nullptr, "dropout");
  unread(input.overrides.logit_bias.data != nullptr || input.overrides.forbidden.data != nullptr ||
             !input.overrides.forced.empty() || input.overrides.gates.data != nullptr,
         "overrides");
  const Index sequences = stages::for_each_filled(input.tokens(), [](Index, Index, Index) {});
  require(sequences <= config_.max_sequences, Errc::limit_exceeded, "SoftMoe: ", sequences,
          " sequences with tokens, max_sequences is ", config_.max_sequences);
  return sequences;
}

template <ExpertBank B>
auto SoftMoe<B>::share_out(RoutingTable<T>& table, Index sequences) const -> Routing<T> {
  const T gate = T(1);
  table.begin(sequences * total_slots());
  for (Index row = 0; row < sequences * total_slots(); ++row) {
    const auto expert = static_cast<std::int32_t>(row % total_slots() / config_.slots);
    table.select(row, std::span(&expert, 1), std::span(&gate, 1));
  }
  table.finish();
  return table.view();
}

template <ExpertBank B>
void SoftMoe<B>::forward(const Prepared& prepared, const LayerInput<T>& input, MatView<T> y,
                         Tape* tape, const Context& context) const {
  const Index tokens = input.x.rows, sequences = check_input(input);
  require_shape("y", y, tokens, output_width());
  require_apart("y", y, "x", input.x);
  require(tape == nullptr || tape->found.dispatch.rows >= tokens, Errc::limit_exceeded,
          "SoftMoe: ", tokens, " tokens, the tape was made for ",
          tape == nullptr ? 0 : tape->found.dispatch.rows);
  const Workspace::Frame frame(context.scratch);
  Rows own;
  if (tape == nullptr) {
    own = take_rows(context.scratch, tokens, sequences);
    own.routing = make_slot_table(context.scratch, slot_rows(sequences, tokens));
  }
  Rows& work = tape != nullptr ? *tape : own;
  slots_.weigh(prepared.slots, input.tokens(), work.found, context);
  const Index filled = work.found.sequences;
  const MatView<T> merged = work.merged.row_block(0, filled * total_slots());
  const MatView<T> worked = work.worked.row_block(0, filled * total_slots());
  rows::fill(merged, 0);
  for (Index q = 0; q < filled; ++q) {
    soft::to_slots<T>(work.found.listed(q), work.found.dispatch, input.x, of_sequence(merged, q),
                      context);
  }
  experts_.forward(prepared.experts, BankInput<T>{.x = merged, .overwrite = true},
                   share_out(work.routing, filled), worked,
                   tape != nullptr ? &tape->experts : nullptr, context);
  for (Index q = 0; q < filled; ++q) {
    soft::to_tokens<T>(work.found.listed(q), work.found.combine, of_sequence(worked, q), y,
                       context);
  }
}

template <ExpertBank B>
void SoftMoe<B>::backward(const Weights& weights, const Tape& tape, const LayerInput<T>& input,
                          MatView<const T> dy, MatView<T> dx, const Params<T>& grad,
                          const Context& context) const {
  const auto& found = tape.found;
  const Index tokens = found.tokens, filled = found.sequences, rows = filled * total_slots();
  slots_.check(weights.slots);
  slots_.check_gradient(grad.slots);
  require_shape("x", input.x, tokens, input_width());
  require_shape("dy", dy, tokens, output_width());
  if (dx.data != nullptr) require_shape("dx", dx, tokens, input_width());
  require_apart("dx", dx, "x", input.x);
  require_apart("dx", dx, "dy", dy);
  const Workspace::Frame frame(context.scratch);
  const MatView<T> d_merged = context.scratch.template take<T>(rows, input_width());
  const MatView<T> d_worked = context.scratch.template take<T>(rows, output_width());
  const auto d_gate = context.scratch.template take<T>(rows);
  const MatView<T> d_dispatch = context.scratch.template take<T>(tokens, total_slots());
  const MatView<T> d_combine = context.scratch.template take<T>(tokens, total_slots());
  rows::fill(d_merged, 0);
  rows::fill(d_worked, 0);
  std::ranges::fill(d_gate, T(0));
  for (Index q = 0; q < filled; ++q) {
    soft::to_slots<T>(found.listed(q), found.combine, dy, of_sequence(d_worked, q), context);
    soft::products<T>(found.listed(q), dy, of_sequence(tape.worked, q), d_combine, context);
  }
  experts_.backward(weights.experts, tape.experts,
                    BankInput<T>{.x = tape.merged.row_block(0, rows)}, tape.routing.view(),
                    d_worked, d_gate, BankInputGradient<T>{.x = d_merged}, grad.experts, context);
  if (dx.data == nullptr && grad.slots.phi.data == nullptr && grad.slots.scale.data == nullptr) {
    return;
  }
  for (Index q = 0; q < filled; ++q) {
    soft::products<T>(found.listed(q), input.x, of_sequence(d_merged, q), d_dispatch, context);
    if (dx.data == nullptr) continue;
    soft::to_tokens<T>(found.listed(q), found.dispatch, of_sequence(d_merged, q), dx, context);
  }
  slots_.weigh_backward(weights.slots, found, input.x, d_dispatch, d_combine, dx, grad.slots,
                        context);
}

template <ExpertBank B>
void SoftMoe<B>::route(const Prepared& prepared, None, const LayerInput<T>& input, None,
                       RoutingTable<T>& table, None, std::nullptr_t, const Context& context) const {
  const Index tokens = input.x.rows, sequences = check_input(input);
  const Workspace::Frame frame(context.scratch);
  auto found = slots_.take_assignment(context.scratch, tokens, std::min(sequences, tokens));
  const auto gate = context.scratch.template take<T>(experts_.experts());
  table.begin(tokens);
  slots_.weigh(prepared.slots, input.tokens(), found, context);
  for (const std::int32_t t : found.listed()) {
    std::ranges::fill(gate, T(0));
    for (Index s = 0; s < total_slots(); ++s) gate[s / config_.slots] += found.combine(t, s);
    table.select_all(t, gate);
  }
  table.finish();
}

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// FfnBank: feed-forward experts, every one of their matrices with a low-rank adapter if wanted,
// all behind one routing.
//
//   y_t += Σ_e gate_te F_e(x_t)
//
//   form     F_e(x)                              matrices
//   gated    D_e(act(G_e x) ∘ U_e x)             gate, up [inner, in], down [out, inner]
//   fused    the same, G_e above U_e             up [2 inner, in], down [out, inner]
//   plain    D_e act(U_e x)                      up [inner, in], down [out, inner]
//
//   M_e v = W_e v + b_e + scale_e B_e A_e v      W, b shared by the experts, or their own
//
// A shared G x and U x is computed once per token, a shared D once per token too: it is linear, so
// it is applied to Σ_e gate_te a_te, with a_te what goes into D.
//
// Shared: MixLoRA (Li et al., 2024). Own: Uni-MoE (Li et al., 2024), and any experts of full size.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/bank_memory.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/experts/linear_bank.hpp"
#include "mole/kernels/activation.hpp"

namespace mole::inline MOLE_ABI {

enum class FfnForm { gated, fused, plain };
constexpr std::array<std::string_view, 3> enum_names(FfnForm) noexcept {
  return {"gated", "fused", "plain"};
}

/// `gate` is empty unless the form is gated.
template <class V>
struct FfnBankParams {
  LinearBankParams<V> gate, up, down;

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    visit_group<LinearBankParams<V>>(Leaf{"gate"}, f, p.gate...);
    visit_group<LinearBankParams<V>>(Leaf{"up"}, f, p.up...);
    visit_group<LinearBankParams<V>>(Leaf{"down"}, f, p.down...);
  }
  operator FfnBankParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {gate, up, down};
  }
};

template <class T>
class FfnBank : public BankMemory<FfnBank<T>> {
 public:
  using Scalar = T;
  using Projection = LinearBank<T>;
  template <class V>
  using Params = FfnBankParams<V>;
  using Weights = Params<const T>;

  /// Of one matrix of every expert.
  struct Adapters {
    std::vector<Index> rank = {};  ///< [experts], 0 or more, or empty: not adapted
    std::vector<T> scale = {};     ///< [experts] with ranks
  };

  struct Config {
    Index in = 0;       ///< input width
    Index inner = 0;    ///< what goes into down
    Index out = 0;      ///< output width
    Index experts = 0;  ///< 1 ... 65536
    FfnForm form = FfnForm::gated;
    Activation activation = Activation::silu;
    ExpertBase base = ExpertBase::shared;
    bool inner_bias = false;  ///< of gate and up
    bool outer_bias = false;  ///< of down
    Adapters gate = {}, up = {}, down = {};

    static constexpr std::string_view kind() noexcept { return "ffn_bank"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("in"), c.in...);
      f(Field::required("inner"), c.inner...);
      f(Field::required("out"), c.out...);
      f(Field::required("experts"), c.experts...);
      f(Field{"form"}, c.form...);
      f(Field{"activation"}, c.activation...);
      f(Field{"base"}, c.base...);
      f(Field{"inner_bias"}, c.inner_bias...);
      f(Field{"outer_bias"}, c.outer_bias...);
      f(Field{"gate_rank"}, c.gate.rank...);
      f(Field{"gate_scale"}, c.gate.scale...);
      f(Field{"up_rank"}, c.up.rank...);
      f(Field{"up_scale"}, c.up.scale...);
      f(Field{"down_rank"}, c.down.rank...);
      f(Field{"down_scale"}, c.down.scale...);
    }
  };

  /// Packed snapshot of the weights. Immutable; any number of calls may share it.
  struct Prepared {
    typename Projection::Prepared gate, up, down;
  };

  /// Rows by slot.
  struct Tape {
    MatView<T> inner;   ///< [max slots, inner], or [., 2 inner] with a gate: before the activation
    MatView<T> active;  ///< [max slots, inner], what goes into down
    typename Projection::Tape gate, up, down;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(Leaf{"inner"}, p.inner...);
      f(Leaf{"active"}, p.active...);
      visit_group<typename Projection::Tape>(Leaf{"gate"}, f, p.gate...);
      visit_group<typename Projection::Tape>(Leaf{"up"}, f, p.up...);
      visit_group<typename Projection::Tape>(Leaf{"down"}, f, p.down...);
    }
  };

  static constexpr bool needs_base = false;

  /// Throws invalid_argument naming the field.
  explicit FfnBank(Config config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.in; }
  Index output_width() const noexcept { return config_.out; }
  Index experts() const noexcept { return config_.experts; }

  template <class V, class Arena>
  Params<V> take_params(Arena& arena) const;
  template <class Arena>
  Prepared take_prepared(Arena& arena) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index max_tokens, Index max_slots) const;
  std::size_t scratch_bytes(Index max_tokens, Index max_slots, int workers) const noexcept;

  /// Throws shape_mismatch unless the weights are those of the config.
  Prepared prepare(const Weights& weights, Workspace& memory) const;

  /// Adds into y. Throws before any write on wrong shapes or too little memory.
  void forward(const Prepared& prepared, const BankInput<T>& input, const Routing<T>& routing,
               MatView<T> y, Tape* tape, const Context& context) const;

  /// Adds into dgate [slots], d_input.x and the tensors of grad if given; a frozen base has none.
  void backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                const BankInputGradient<T>& d_input, const Params<T>& grad,
                const Context& context) const;

 private:
  /// What stands between the matrices, rows by slot.
  struct Rows {
    MatView<T> inner, active;
  };
  struct Scratch {
    Rows rows;                      // in backward their gradients
    std::span<T> unit;              // [slots], gates of gate and up
    std::span<std::int32_t> slots;  // those in use
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, Index slots) const;
  template <class Arena>
  Rows take_rows(Arena& arena, Index slots) const {
    return {arena.template take<T>(slots, saturating_product(halves(), config_.inner)),
            arena.template take<T>(slots, config_.inner)};
  }
  void check_memory(const Routing<T>& routing, const Context& context) const;
  void check_tape(const Tape& tape, Index slots) const;

  bool has_gate() const noexcept { return config_.form == FfnForm::gated; }
  Index halves() const noexcept { return config_.form == FfnForm::plain ? 1 : 2; }
  /// Gate and up side by side, as the activation reads them and as the matrices write them.
  MatView<T> gate_of(MatView<T> inner) const noexcept { return inner.col_block(0, config_.inner); }
  MatView<T> up_of(MatView<T> inner) const noexcept {
    return halves() == 1 ? MatView<T>{} : inner.col_block(config_.inner, config_.inner);
  }
  MatView<T> written_by_up(MatView<T> inner) const noexcept {
    return has_gate() ? up_of(inner) : inner;
  }

  /// The slots with gates of 1; with `probes`, probes are active too.
  static Routing<T> unit_routing(const Routing<T>& routing, bool probes, std::span<T> ones);

  Config config_;
  std::optional<Projection> gate_;
  Projection up_, down_;
};

namespace detail {

template <class T>
LinearBank<T> ffn_projection(const typename FfnBank<T>::Config& c, bool inwards, Index halves,
                             const typename FfnBank<T>::Adapters& adapters) {
  const auto positive = [](const char* field, Index width) {
    require(width > 0, Errc::invalid_argument, "FfnBank: ", field, " must be positive, got ",
            width);
  };
  positive("in", c.in);
  positive("inner", c.inner);
  positive("out", c.out);
  typename LinearBank<T>::Config config;
  config.in = inwards ? c.in : c.inner;
  config.out = inwards ? saturating_product(halves, c.inner) : c.out;
  config.experts = c.experts;
  config.base = c.base;
  config.bias = inwards ? c.inner_bias : c.outer_bias;
  config.rank = adapters.rank;
  config.scale = adapters.scale;
  return LinearBank<T>(std::move(config));
}

}  // namespace detail

template <class T>
FfnBank<T>::FfnBank(Config config)
    : config_(std::move(config)),
      up_(detail::ffn_projection<T>(config_, true, config_.form == FfnForm::fused ? 2 : 1,
                                    config_.up)),
      down_(detail::ffn_projection<T>(config_, false, 1, config_.down)) {
  require(has_gate() || config_.gate.rank.empty(), Errc::invalid_argument,
          "FfnBank: gate_rank: the form ",
          enum_names(config_.form)[static_cast<std::size_t>(config_.form)],
          " has no gate of its own, expected no ranks, got ", config_.gate.rank.size());
  if (has_gate()) gate_ = detail::ffn_projection<T>(config_, true, 1, config_.gate);
}

template <class T>
template <class V, class Arena>
auto FfnBank<T>::take_params(Arena& arena) const -> Params<V> {
  Params<V> params;
  if (gate_) params.gate = gate_->template take_params<V>(arena);
  params.up = up_.template take_params<V>(arena);
  params.down = down_.template take_params<V>(arena);
  return params;
}

template <class T>
template <class Arena>
auto FfnBank<T>::take_prepared(Arena& arena) const -> Prepared {
  Prepared prepared;
  if (gate_) prepared.gate = gate_->take_prepared(arena);
  prepared.up = up_.take_prepared(arena);
  prepared.down = down_.take_prepared(arena);
  return prepared;
}

template <class T>
template <class Arena>
auto FfnBank<T>::take_tape(Arena& arena, Index max_tokens, Index max_slots) const -> Tape {
  Tape tape;
  const Rows rows = take_rows(arena, max_slots);
  tape.inner = rows.inner;
  tape.active = rows.active;
  if (gate_) tape.gate = gate_->take_tape(arena, max_tokens, max_slots);
  tape.up = up_.take_tape(arena, max_tokens, max_slots);
  tape.down = down_.take_tape(arena, max_tokens, max_slots);
  return tape;
}

template <class T>
template <class Arena>
auto FfnBank<T>::take_scratch(Arena& arena, Index slots) const -> Scratch {
  return {take_rows(arena, slots), arena.template take<T>(slots),
          arena.template take<std::int32_t>(slots)};
}

template <class T>
std::size_t FfnBank<T>::scratch_bytes(Index max_tokens, Index max_slots,
                                      int workers) const noexcept {
  ByteCounter counter;
  take_scratch(counter, max_slots);
  const auto bytes = [&](const Projection& projection) {
    return projection.scratch_bytes(max_tokens, max_slots, workers);
  };
  return counter.bytes() + std::max({gate_ ? bytes(*gate_) : 0, bytes(up_), bytes(down_)});
}

template <class T>
auto FfnBank<T>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  if (gate_) gate_->check_weights(weights.gate);
  up_.check_weights(weights.up);
  down_.check_weights(weights.down);
  const Prepared prepared = take_prepared(memory);
  if (gate_) gate_->pack(weights.gate, prepared.gate);
  up_.pack(weights.up, prepared.up);
  down_.pack(weights.down, prepared.down);
  return prepared;
}

template <class T>
void FfnBank<T>::check_memory(const Routing<T>& routing, const Context& context) const {
  const std::size_t bytes = scratch_bytes(routing.tokens, routing.slots(), context.workers);
  require(context.scratch.free_bytes() + kAlignment >= bytes, Errc::out_of_memory,
          "FfnBank: ", bytes, " bytes of scratch needed, ", context.scratch.free_bytes(),
          " are free");
}

template <class T>
void FfnBank<T>::check_tape(const Tape& tape, Index slots) const {
  require(tape.active.rows >= slots && tape.active.cols == config_.inner &&
              tape.inner.rows >= slots && tape.inner.cols == halves() * config_.inner,
          Errc::out_of_memory, "FfnBank: the tape holds ", tape.active.rows, " slots of width ",
          tape.active.cols, ", expected ", slots, " of width ", config_.inner);
  if (gate_) gate_->check_tape(tape.gate, slots);
  up_.check_tape(tape.up, slots);
  down_.check_tape(tape.down, slots);
}

template <class T>
Routing<T> FfnBank<T>::unit_routing(const Routing<T>& routing, bool probes, std::span<T> ones) {
  for (std::size_t s = 0; s < ones.size(); ++s) {
    ones[s] = probes || routing.gate[s] != T(0) ? T(1) : T(0);
  }
  Routing<T> unit = routing;
  unit.gate = ones;
  if (probes) unit.lists.active_end = routing.lists.expert_begin.subspan(1);
  return unit;
}

template <class T>
void FfnBank<T>::forward(const Prepared& prepared, const BankInput<T>& input,
                         const Routing<T>& routing, MatView<T> y, Tape* tape,
                         const Context& context) const {
  require_bank_call<T>(input, routing, y, config_.experts, config_.in, config_.out);
  const Index slots = routing.slots();
  if (slots == 0) return begin_output(input, y);
  check_memory(routing, context);
  if (tape != nullptr) check_tape(*tape, slots);
  Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, slots);
  const bool recorded = tape != nullptr;
  const MatView<T> inner = (recorded ? tape->inner : scratch.rows.inner).row_block(0, slots);
  const MatView<T> active = (recorded ? tape->active : scratch.rows.active).row_block(0, slots);

  // With a tape, probes get rows too: the gradient of their gates needs them.
  const Routing<T> unit = unit_routing(routing, recorded, scratch.unit);
  const BankInput<T> to_slots{
      .x = input.x, .x_rows = input.x_rows, .y_rows = RowsBy::slot, .overwrite = true};
  if (gate_) {
    gate_->forward(prepared.gate, to_slots, unit, gate_of(inner), recorded ? &tape->gate : nullptr,
                   context);
  }
  up_.forward(prepared.up, to_slots, unit, written_by_up(inner), recorded ? &tape->up : nullptr,
              context);
  const gated::Rows used = gated::used_rows<T>(unit.token_begin, unit.gate, RowsBy::slot,
                                               gated::Slots::active, scratch.slots);
  gated::activate<T>(config_.activation, used, gate_of(inner), up_of(inner), active, context);
  const BankInput<T> from_slots{
      .x = active, .x_rows = RowsBy::slot, .y_rows = input.y_rows, .overwrite = input.overwrite};
  down_.forward(prepared.down, from_slots, routing, y, recorded ? &tape->down : nullptr, context);
}

template <class T>
void FfnBank<T>::backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                          const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                          const BankInputGradient<T>& d_input, const Params<T>& grad,
                          const Context& context) const {
  const auto check = [](const Projection& projection, const auto& w, const auto& g) {
    projection.check_weights(w);
    projection.check_gradient(g);
  };
  if (gate_) check(*gate_, weights.gate, grad.gate);
  check(up_, weights.up, grad.up);
  check(down_, weights.down, grad.down);
  require_bank_call<T>(input, routing, dy, dgate, d_input, config_.experts, config_.in,
                       config_.out);
  const Index slots = routing.slots();
  if (slots == 0) return;
  check_tape(saved, slots);
  check_memory(routing, context);
  Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, slots);
  const MatView<T> inner = saved.inner.row_block(0, slots);
  const MatView<T> d_inner = scratch.rows.inner, d_active = scratch.rows.active;
  std::fill_n(d_inner.data, d_inner.size(), T(0));
  std::fill_n(d_active.data, d_active.size(), T(0));

  const BankInput<T> from_slots{
      .x = saved.active.row_block(0, slots), .x_rows = RowsBy::slot, .y_rows = input.y_rows};
  down_.backward(weights.down, saved.down, from_slots, routing, dy, dgate, {.x = d_active},
                 grad.down, context);
  const Routing<T> unit = unit_routing(routing, false, scratch.unit);
  const gated::Rows used = gated::used_rows<T>(unit.token_begin, unit.gate, RowsBy::slot,
                                               gated::Slots::active, scratch.slots);
  gated::activate_backward<T>(config_.activation, used, gate_of(inner), up_of(inner), d_active,
                              gate_of(d_inner), up_of(d_inner), context);
  const BankInput<T> to_slots{.x = input.x, .x_rows = input.x_rows, .y_rows = RowsBy::slot};
  if (gate_) {
    gate_->backward(weights.gate, saved.gate, to_slots, unit, gate_of(d_inner), {}, d_input,
                    grad.gate, context);
  }
  up_.backward(weights.up, saved.up, to_slots, unit, written_by_up(d_inner), {}, d_input, grad.up,
               context);
}

#ifndef MOLE_HEADER_ONLY
extern template class FfnBank<float>;
extern template class FfnBank<double>;
#endif

static_assert(ExpertBank<FfnBank<float>>);

}  // namespace mole::inline MOLE_ABI

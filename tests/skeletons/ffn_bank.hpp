// SPDX-License-Identifier: Apache-2.0
// Feed-forward experts: one frozen gated block whose three matrices have a low-rank adapter per
// expert, all three behind one routing (Li et al., "MixLoRA", 2024).
//
//   y_t += Σ_e gate_te F_e(x_t)      F_e(x) = D_e(silu(G_e x) ∘ U_e x)      M_e v = M v + s_e B_e
//   A_e v
//
//   x, y [tokens, width]   G, U [inner, width]   D [width, inner]
//
// G x and U x are computed once per row of x. D is linear, so it is applied once per row of y:
//   y_t += D Σ_e gate_te a_te + Σ_e gate_te s_e B_e A_e a_te      a_te = silu(g_te) ∘ u_te
// Hence dgate has two parts: the down adapters', and ⟨Dᵀ dy_t, a_te⟩ of the shared matrix.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "mole/experts/lora_bank.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/kernels/math.hpp"

namespace skeleton {

using mole::Index;
using mole::MatView;

/// The three matrices of the frozen block belong to the host, so `visit` does not name them.
template <class V>
struct FfnBankParams {
  mole::LoraBankParams<V> gate, up, down;
  MatView<V> frozen_gate = {}, frozen_up = {}, frozen_down = {};  ///< G, U, D; only of weights

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    using Lora = mole::LoraBankParams<V>;
    mole::visit_group<Lora>(mole::Leaf{"gate"}, f, p.gate...);
    mole::visit_group<Lora>(mole::Leaf{"up"}, f, p.up...);
    mole::visit_group<Lora>(mole::Leaf{"down"}, f, p.down...);
  }
  operator FfnBankParams<const V>() const noexcept requires(!std::is_const_v<V>) {
    return {gate, up, down, frozen_gate, frozen_up, frozen_down};
  }
};

template <class T>
class FfnBank {
 public:
  using Scalar = T;
  using Lora = mole::LoraBank<T>;
  using LoraConfig = typename Lora::Config;
  template <class V>
  using Params = FfnBankParams<V>;
  using Weights = Params<const T>;

  struct Config {
    Index width = 0, inner = 0;
    std::vector<Index> gate_rank, up_rank, down_rank;  ///< [experts]; 0: not adapted
    T scale = T(1);
  };
  struct Prepared {
    mole::Panels<T> gate, up, down;
    typename Lora::Prepared gate_adapters, up_adapters, down_adapters;
  };
  /// Rows by slot.
  struct Tape {
    MatView<T> gate, up;  ///< [slots, inner], G_e x and U_e x
    MatView<T> active;    ///< [slots, inner], silu(gate) ∘ up
    typename Lora::Tape gate_adapters, up_adapters, down_adapters;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(mole::Leaf{"gate"}, p.gate...);
      f(mole::Leaf{"up"}, p.up...);
      f(mole::Leaf{"active"}, p.active...);
    }
  };

  static constexpr bool needs_base = false;

  explicit FfnBank(const Config& c)
      : config_(c),
        gate_(adapters(c.width, c.inner, c.gate_rank, c.scale)),
        up_(adapters(c.width, c.inner, c.up_rank, c.scale)),
        down_(adapters(c.inner, c.width, c.down_rank, c.scale)) {
    mole::require(gate_.experts() == up_.experts() && up_.experts() == down_.experts(),
                  mole::Errc::invalid_argument, "FfnBank: gate_rank, up_rank and down_rank differ");
  }

  Index input_width() const noexcept { return config_.width; }
  Index output_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return gate_.experts(); }

  /// The frozen matrices are 0.1.
  template <class V>
  Params<V> make_params(mole::Workspace& memory) const {
    Params<V> params{gate_.template make_params<V>(memory), up_.template make_params<V>(memory),
                     down_.template make_params<V>(memory)};
    const auto frozen = [&](Index rows, Index cols) {
      const MatView<V> view = memory.take<V>(rows, cols);
      std::fill_n(view.data, view.size(), V(0.1));
      return view;
    };
    params.frozen_gate = frozen(config_.inner, config_.width);
    params.frozen_up = frozen(config_.inner, config_.width);
    params.frozen_down = frozen(config_.width, config_.inner);
    return params;
  }
  template <class V>
  std::size_t params_bytes() const noexcept {
    mole::ByteCounter counter;
    for (int i = 0; i < 3; ++i) counter.take<V>(config_.inner, config_.width);
    return counter.bytes() + gate_.template params_bytes<V>() + up_.template params_bytes<V>() +
           down_.template params_bytes<V>();
  }

  std::size_t prepared_bytes() const noexcept {
    mole::ByteCounter counter;
    for (int i = 0; i < 3; ++i) counter.take<T>(config_.width, config_.inner);
    return counter.bytes() + gate_.prepared_bytes() + up_.prepared_bytes() + down_.prepared_bytes();
  }
  std::size_t scratch_bytes(Index tokens, Index slots, int workers) const noexcept {
    mole::ByteCounter counter;
    counter.take<T>(std::max(tokens, slots), config_.inner);
    counter.take<std::int32_t>(std::max(tokens, slots));
    for (int i = 0; i < 3; ++i) counter.take<T>(slots, config_.inner);
    for (int i = 0; i < 2; ++i) counter.take<T>(slots);
    return counter.bytes() + std::max({gate_.scratch_bytes(tokens, slots, workers),
                                       up_.scratch_bytes(tokens, slots, workers),
                                       down_.scratch_bytes(tokens, slots, workers)});
  }
  std::size_t tape_bytes(Index tokens, Index slots) const noexcept {
    mole::ByteCounter counter;
    for (int i = 0; i < 3; ++i) counter.take<T>(slots, config_.inner);
    return counter.bytes() + gate_.tape_bytes(tokens, slots) + up_.tape_bytes(tokens, slots) +
           down_.tape_bytes(tokens, slots);
  }
  Tape make_tape(mole::Workspace& memory, Index tokens, Index slots) const {
    Tape tape = take_rows(memory, slots);
    tape.gate_adapters = gate_.make_tape(memory, tokens, slots);
    tape.up_adapters = up_.make_tape(memory, tokens, slots);
    tape.down_adapters = down_.make_tape(memory, tokens, slots);
    return tape;
  }

  Prepared prepare(const Weights& weights, mole::Workspace& memory) const {
    const auto pack = [&](const char* name, MatView<const T> weight, Index rows, Index cols) {
      mole::require_shape(name, weight, rows, cols);
      return mole::pack_panels(weight, memory.take<T>(rows * cols).data());
    };
    return {pack("frozen_gate", weights.frozen_gate, config_.inner, config_.width),
            pack("frozen_up", weights.frozen_up, config_.inner, config_.width),
            pack("frozen_down", weights.frozen_down, config_.width, config_.inner),
            gate_.prepare(weights.gate, memory),
            up_.prepare(weights.up, memory),
            down_.prepare(weights.down, memory)};
  }

  void forward(const Prepared& prepared, const mole::BankInput<T>& input,
               const mole::Routing<T>& routing, MatView<T> y, Tape* tape,
               const mole::Context& context) const {
    check_call(input, routing, y, context);
    const Index slots = routing.slots();
    if (slots == 0) return mole::begin_output(input, y);
    mole::Workspace& scratch = context.scratch;
    const mole::Workspace::Frame frame(scratch);
    const Tape rows = first_rows(tape != nullptr ? *tape : take_rows(scratch, slots), slots);
    // Probes need their own rows too, for the gradient of their gates.
    const mole::Routing<T> unit = with_unit_gates(routing, tape != nullptr, scratch);
    const mole::BankInput<T> to_slots{
        .x = input.x, .x_rows = input.x_rows, .y_rows = mole::RowsBy::slot};
    const MatView<T> shared = scratch.take<T>(std::max(input.x.rows, y.rows), config_.inner);
    const MatView<T> by_x = shared.row_block(0, input.x.rows);
    mole::dense::forward<T>(prepared.gate, {}, input.x, by_x, context);
    spread(by_x, routing, input.x_rows, rows.gate);
    gate_.forward(prepared.gate_adapters, to_slots, unit, rows.gate,
                  tape != nullptr ? &tape->gate_adapters : nullptr, context);
    mole::dense::forward<T>(prepared.up, {}, input.x, by_x, context);
    spread(by_x, routing, input.x_rows, rows.up);
    up_.forward(prepared.up_adapters, to_slots, unit, rows.up,
                tape != nullptr ? &tape->up_adapters : nullptr, context);
    activate(rows);

    const MatView<T> by_y = shared.row_block(0, y.rows);
    collect(rows.active, routing, routing.gate, input.y_rows, by_y);
    const std::span<const std::int32_t> used = rows_in_use(routing, input.y_rows, scratch);
    mole::begin_output(input, y);
    mole::panel_product<T>({MatView<const T>(by_y), used.data()}, static_cast<Index>(used.size()),
                           prepared.down, 0, prepared.down.count(), {y, used.data()}, false,
                           context.isa);
    const mole::BankInput<T> from_slots{
        .x = rows.active, .x_rows = mole::RowsBy::slot, .y_rows = input.y_rows};
    down_.forward(prepared.down_adapters, from_slots, routing, y,
                  tape != nullptr ? &tape->down_adapters : nullptr, context);
  }

  void backward(const Weights& weights, const Tape& saved, const mole::BankInput<T>& input,
                const mole::Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                const mole::BankInputGradient<T>& d_input, const Params<T>& grad,
                const mole::Context& context) const {
    check_call(input, routing, dy, context);
    const Index slots = routing.slots();
    mole::require(static_cast<Index>(dgate.size()) >= slots, mole::Errc::shape_mismatch,
                  "FfnBank: dgate has ", dgate.size(), " elements, the routing ", slots, " slots");
    if (d_input.x.data != nullptr) {
      mole::require_shape("dx", d_input.x, input.x.rows, config_.width);
    }
    if (slots == 0) return;
    mole::Workspace& scratch = context.scratch;
    const mole::Workspace::Frame frame(scratch);
    const Tape rows = first_rows(saved, slots);
    const MatView<T> d_active = zeros(scratch, slots);
    const MatView<T> shared = zeros(scratch, std::max(input.x.rows, dy.rows));
    const mole::BankInput<T> from_slots{
        .x = rows.active, .x_rows = mole::RowsBy::slot, .y_rows = input.y_rows};
    down_.backward(weights.down, saved.down_adapters, from_slots, routing, dy, dgate,
                   {.x = d_active}, grad.down, context);
    const MatView<T> by_y = shared.row_block(0, dy.rows);
    mole::dense::input_gradient<T>(weights.frozen_down, dy, by_y, context);
    frozen_down_backward(routing, input.y_rows, rows.active, by_y, dgate, d_active);

    const MatView<T> d_gate = zeros(scratch, slots), d_up = d_active;
    activate_backward(rows, d_active, d_gate, d_up);
    const mole::Routing<T> unit = with_unit_gates(routing, false, scratch);
    const std::span<T> unwanted = scratch.take<T>(slots);
    std::ranges::fill(unwanted, T(0));
    const mole::BankInput<T> to_slots{
        .x = input.x, .x_rows = input.x_rows, .y_rows = mole::RowsBy::slot};
    gate_.backward(weights.gate, saved.gate_adapters, to_slots, unit, d_gate, unwanted, d_input,
                   grad.gate, context);
    up_.backward(weights.up, saved.up_adapters, to_slots, unit, d_up, unwanted, d_input, grad.up,
                 context);
    if (d_input.x.data == nullptr) return;
    const MatView<T> by_x = shared.row_block(0, input.x.rows);
    collect(d_gate, routing, unit.gate, input.x_rows, by_x);
    mole::dense::input_gradient<T>(weights.frozen_gate, by_x, d_input.x, context);
    collect(d_up, routing, unit.gate, input.x_rows, by_x);
    mole::dense::input_gradient<T>(weights.frozen_up, by_x, d_input.x, context);
  }

 private:
  static LoraConfig adapters(Index in, Index out, std::vector<Index> rank, T scale) {
    const std::size_t experts = rank.size();
    return {in, out, std::move(rank), std::vector<T>(experts, scale)};
  }
  Tape take_rows(mole::Workspace& memory, Index slots) const {
    Tape tape;
    for (MatView<T>* view : {&tape.gate, &tape.up, &tape.active}) {
      *view = memory.take<T>(slots, config_.inner);
    }
    return tape;
  }
  static Tape first_rows(const Tape& tape, Index slots) {
    mole::require(slots <= tape.active.rows, mole::Errc::limit_exceeded, "FfnBank tape: made for ",
                  tape.active.rows, " slots, got ", slots);
    Tape rows = tape;
    for (MatView<T>* view : {&rows.gate, &rows.up, &rows.active}) *view = view->row_block(0, slots);
    return rows;
  }
  MatView<T> zeros(mole::Workspace& memory, Index rows) const {
    const MatView<T> view = memory.take<T>(rows, config_.inner);
    std::fill_n(view.data, view.size(), T(0));
    return view;
  }
  void check_call(const mole::BankInput<T>& input, const mole::Routing<T>& routing,
                  MatView<const T> y, const mole::Context& context) const {
    const Index slots = routing.slots();
    const auto rows = [&](mole::RowsBy by) {
      return by == mole::RowsBy::slot ? slots : routing.tokens;
    };
    mole::require(routing.experts == experts(), mole::Errc::shape_mismatch, "FfnBank: routing has ",
                  routing.experts, " experts, the bank has ", experts());
    mole::require_shape("x", input.x, rows(input.x_rows), config_.width);
    mole::require_shape("y", y, rows(input.y_rows), config_.width);
    const std::size_t bytes = scratch_bytes(routing.tokens, slots, context.workers);
    mole::require(context.scratch.free_bytes() + mole::kAlignment >= bytes,
                  mole::Errc::out_of_memory, "FfnBank: ", bytes, " bytes of scratch needed, ",
                  context.scratch.free_bytes(), " are free");
  }

  /// The same slots with gates of 1; with `probes`, those that were probes are active too.
  static mole::Routing<T> with_unit_gates(const mole::Routing<T>& routing, bool probes,
                                          mole::Workspace& memory) {
    const std::span<T> ones = memory.take<T>(routing.slots());
    std::ranges::fill(ones, T(1));
    mole::Routing<T> unit = routing;
    unit.gate = ones;
    if (probes) unit.lists.active_end = routing.lists.expert_begin.subspan(1);
    return unit;
  }

  static Index row_of(mole::RowsBy by, Index token, Index slot) noexcept {
    return by == mole::RowsBy::slot ? slot : token;
  }
  /// body(token, slot) for every slot.
  template <class Body>
  static void for_each_slot(const mole::Routing<T>& routing, Body&& body) {
    for (Index t = 0; t < routing.tokens; ++t) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) body(t, s);
    }
  }
  /// Rows with an active slot, ascending: the others must keep their bits.
  static std::span<const std::int32_t> rows_in_use(const mole::Routing<T>& routing, mole::RowsBy by,
                                                   mole::Workspace& memory) {
    const Index all = by == mole::RowsBy::slot ? routing.slots() : routing.tokens;
    const std::span<std::int32_t> rows = memory.take<std::int32_t>(all);
    std::size_t count = 0;
    for_each_slot(routing, [&](Index t, Index s) {
      const auto row = static_cast<std::int32_t>(row_of(by, t, s));
      if (routing.gate[s] == T(0) || (count > 0 && rows[count - 1] == row)) return;
      rows[count++] = row;
    });
    return rows.first(count);
  }
  /// Copies a row to every slot that reads it.
  static void spread(MatView<const T> from, const mole::Routing<T>& routing, mole::RowsBy by,
                     MatView<T> to) {
    for_each_slot(routing, [&](Index t, Index s) {
      std::ranges::copy(from.row(row_of(by, t, s)), to.row(s).begin());
    });
  }
  /// to[row] = Σ gate[s] from[s] over the active slots of a row.
  static void collect(MatView<const T> from, const mole::Routing<T>& routing,
                      std::span<const T> gate, mole::RowsBy by, MatView<T> to) {
    for (Index r = 0; r < to.rows; ++r) std::ranges::fill(to.row(r), T(0));
    for_each_slot(routing, [&](Index t, Index s) {
      const std::span<T> sum = to.row(row_of(by, t, s));
      for (Index i = 0; routing.gate[s] != T(0) && i < to.cols; ++i) {
        sum[i] = std::fma(gate[s], from(s, i), sum[i]);
      }
    });
  }
  static void activate(const Tape& rows) noexcept {
    for (Index s = 0; s < rows.active.rows; ++s) {
      for (Index i = 0; i < rows.active.cols; ++i) {
        const T g = rows.gate(s, i);
        rows.active(s, i) = g * mole::math::sigmoid<T>(g) * rows.up(s, i);
      }
    }
  }
  /// d_up may be d_active.
  static void activate_backward(const Tape& rows, MatView<const T> d_active, MatView<T> d_gate,
                                MatView<T> d_up) noexcept {
    for (Index s = 0; s < rows.active.rows; ++s) {
      for (Index i = 0; i < rows.active.cols; ++i) {
        const T g = rows.gate(s, i), p = mole::math::sigmoid<T>(g);
        d_gate(s, i) = d_active(s, i) * rows.up(s, i) * p * std::fma(g, T(1) - p, T(1));
        d_up(s, i) = d_active(s, i) * g * p;
      }
    }
  }
  /// Both gradients of gate · D a, from v = Dᵀ dy by row of y.
  static void frozen_down_backward(const mole::Routing<T>& routing, mole::RowsBy by,
                                   MatView<const T> active, MatView<const T> v, std::span<T> dgate,
                                   MatView<T> d_active) {
    for_each_slot(routing, [&](Index t, Index s) {
      const std::span<const T> row = v.row(row_of(by, t, s));
      dgate[s] += mole::gated::dot<T>(row, active.row(s));
      for (Index i = 0; routing.gate[s] != T(0) && i < active.cols; ++i) {
        d_active(s, i) = std::fma(routing.gate[s], row[i], d_active(s, i));
      }
    });
  }

  Config config_;
  Lora gate_, up_, down_;
};

static_assert(mole::ExpertBank<FfnBank<float>>);
static_assert(mole::ExpertBank<FfnBank<double>>);

}  // namespace skeleton

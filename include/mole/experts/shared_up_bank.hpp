// SPDX-License-Identifier: Apache-2.0
// SharedUpBank: low-rank experts that share B, the mirror image of SharedDownBank.
//
//   y_t += B z_t     z_t = Σ_e q_te (A_e x_t)     q_te = gate_te · scale_e, rounded
//
//   x [tokens, in]   A_e = down [rank, in]   B = up [out, rank]
//
// The product with B is computed once per token. z is one chain of fused multiply-adds from 0 over
// the active experts of the token, ascending; y is one chain that starts from the host's y and runs
// over the ranks.
//
// Backward, with h_e = A_e x, v = Bᵀ dy:
//   dgate = scale (v·h_e)   dA_e += Σ_t q v xᵀ   dB += Σ_t dy zᵀ   dx += Σ_e q A_eᵀ v
#pragma once

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/bank_memory.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/kernels/chain_product.hpp"
#include "mole/kernels/gated_low_rank.hpp"
#include "mole/kernels/shared_low_rank.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct SharedUpBankParams {
  Index in = 0;                   ///< input width
  std::span<V* const> down = {};  ///< [experts], each [rank, in]
  MatView<V> up = {};             ///< [out, rank]; a gradient without it keeps the shape, no data
  Index down_stride = 0;          ///< elements between rows of down; 0: contiguous

  MatView<V> down_of(Index e) const noexcept {
    return {down[e], up.cols, in, down_stride != 0 ? down_stride : in};
  }
  operator SharedUpBankParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {in, down, up, down_stride};
  }

  template <class F, class P, class... More>
  static void visit(F&& f, P& p, More&... more) {
    for (Index e = 0; e < static_cast<Index>(p.down.size()); ++e) {
      f(Leaf{"down", e}, std::as_const(p).down_of(e), std::as_const(more).down_of(e)...);
    }
    f(Leaf{"up"}, p.up, more.up...);
  }
};

template <class T>
class SharedUpBank : public BankMemory<SharedUpBank<T>> {
 public:
  using Scalar = T;
  template <class V>
  using Params = SharedUpBankParams<V>;
  using Weights = Params<const T>;

  struct Config {
    Index in = 0;          ///< input width
    Index out = 0;         ///< output width
    Index rank = 0;        ///< rank of every A and of B, 0 or more
    std::vector<T> scale;  ///< [experts], alpha / rank

    static constexpr std::string_view kind() noexcept { return "shared_up_bank"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("in"), c.in...);
      f(Field::required("out"), c.out...);
      f(Field::required("rank"), c.rank...);
      f(Field::required("scale"), c.scale...);
    }
  };

  /// Packed snapshot of the weights. Immutable; any number of calls may share it.
  struct Prepared {
    std::span<Panels<T>> down;  ///< [experts], A_eᵀ [in, rank]
    Panels<T> up;               ///< Bᵀ [rank, out]
  };

  struct Tape {
    MatView<T> hidden;  ///< [max slots, rank], A_e x

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(Leaf{"hidden"}, p.hidden...);
    }
  };

  static constexpr bool needs_base = false;

  /// Throws invalid_argument naming the field.
  explicit SharedUpBank(Config config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.in; }
  Index output_width() const noexcept { return config_.out; }
  Index experts() const noexcept { return static_cast<Index>(config_.scale.size()); }

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

  /// Adds into dgate [slots], d_input.x if given, grad.down and grad.up if given.
  void backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                const BankInputGradient<T>& d_input, const Params<T>& grad,
                const Context& context) const;

 private:
  struct Scratch {
    std::span<std::int32_t> rows;         // rows of y in use
    MatView<T> mixed;                     // [rows of y, rank], z
    MatView<T> hidden;                    // [slots, rank], A_e x, then q v
    MatView<T> v;                         // [rows of y, rank], Bᵀ dy
    std::span<MatView<const T>> weights;  // [experts], A_e
    std::span<MatView<T>> gradients;      // [experts], dA_e
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, Index y_rows, Index slots, bool backward) const;
  template <class V>
  void check_params(const Params<V>& params, bool optional) const;
  void check_tape(const Tape& tape, Index slots) const;

  Config config_;
  std::vector<Index> rank_begin_;  // [experts + 1], multiples of the rank
};

template <class T>
SharedUpBank<T>::SharedUpBank(Config config) : config_(std::move(config)) {
  require(config_.in > 0, Errc::invalid_argument, "SharedUpBank: in must be positive, got ",
          config_.in);
  require(config_.out > 0, Errc::invalid_argument, "SharedUpBank: out must be positive, got ",
          config_.out);
  require(config_.rank >= 0, Errc::invalid_argument,
          "SharedUpBank: rank must not be negative, got ", config_.rank);
  require(!config_.scale.empty(), Errc::invalid_argument,
          "SharedUpBank: scale must name an expert");
  for (Index e = 0; e <= experts(); ++e) rank_begin_.push_back(e * config_.rank);
}

template <class T>
template <class V, class Arena>
auto SharedUpBank<T>::take_params(Arena& arena) const -> Params<V> {
  Params<V> params;
  params.in = config_.in;
  const std::span<V*> down = arena.template take<V*>(experts());
  for (Index e = 0; e < experts(); ++e) {
    const MatView<V> block = arena.template take<V>(config_.rank, config_.in);
    if (!down.empty()) down[e] = block.data;
  }
  params.down = down;
  params.up = arena.template take<V>(config_.out, config_.rank);
  return params;
}

template <class T>
template <class Arena>
auto SharedUpBank<T>::take_prepared(Arena& arena) const -> Prepared {
  Prepared prepared;
  prepared.down = arena.template take<Panels<T>>(experts());
  for (Index e = 0; e < experts(); ++e) {
    const Panels<T> panels = take_panels<T>(arena, config_.in, config_.rank);
    if (!prepared.down.empty()) prepared.down[e] = panels;
  }
  prepared.up = take_panels<T>(arena, config_.rank, config_.out);
  return prepared;
}

template <class T>
template <class Arena>
auto SharedUpBank<T>::take_tape(Arena& arena, Index, Index max_slots) const -> Tape {
  return {arena.template take<T>(max_slots, config_.rank)};
}

template <class T>
template <class V>
void SharedUpBank<T>::check_params(const Params<V>& params, bool optional) const {
  if (!optional || params.up.data != nullptr) {
    require_shape("SharedUpBank up", params.up, config_.out, config_.rank);
  }
  if (optional && params.down.empty()) return;
  require(params.in == config_.in && static_cast<Index>(params.down.size()) == experts(),
          Errc::shape_mismatch, "SharedUpBank down: expected ", experts(), " experts of width ",
          config_.in, ", got ", params.down.size(), " of width ", params.in);
  for (Index e = 0; e < experts(); ++e) {
    require_shape("SharedUpBank down", params.down_of(e), config_.rank, config_.in);
  }
}

template <class T>
void SharedUpBank<T>::check_tape(const Tape& tape, Index slots) const {
  require(tape.hidden.rows >= slots && tape.hidden.cols == config_.rank, Errc::out_of_memory,
          "SharedUpBank: the tape holds ", tape.hidden.rows, " slots of rank ", tape.hidden.cols,
          ", expected ", slots, " of rank ", config_.rank);
}

template <class T>
auto SharedUpBank<T>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  check_params(weights, false);
  const Prepared prepared = take_prepared(memory);
  pack_rows(weights.up, 0, prepared.up);
  for (Index e = 0; e < experts(); ++e) pack_rows(weights.down_of(e), 0, prepared.down[e]);
  return prepared;
}

template <class T>
template <class Arena>
auto SharedUpBank<T>::take_scratch(Arena& arena, Index y_rows, Index slots, bool backward) const
    -> Scratch {
  Scratch scratch;
  scratch.rows = arena.template take<std::int32_t>(y_rows);
  scratch.mixed = arena.template take<T>(y_rows, config_.rank);
  scratch.hidden = arena.template take<T>(slots, config_.rank);
  if (!backward) return scratch;
  scratch.v = arena.template take<T>(y_rows, config_.rank);
  scratch.weights = arena.template take<MatView<const T>>(experts());
  scratch.gradients = arena.template take<MatView<T>>(experts());
  return scratch;
}

template <class T>
std::size_t SharedUpBank<T>::scratch_bytes(Index max_tokens, Index max_slots, int) const noexcept {
  ByteCounter counter;
  take_scratch(counter, std::max(max_tokens, max_slots), max_slots, true);
  return counter.bytes();
}

template <class T>
void SharedUpBank<T>::forward(const Prepared& prepared, const BankInput<T>& input,
                              const Routing<T>& routing, MatView<T> y, Tape* tape,
                              const Context& context) const {
  require_bank_call<T>(input, routing, y, experts(), config_.in, config_.out);
  if (routing.slots() == 0) return begin_output(input, y);
  if (tape != nullptr) check_tape(*tape, routing.slots());
  Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, y.rows, routing.slots(), false);
  const MatView<T> hidden = tape != nullptr ? tape->hidden : scratch.hidden;
  const gated::Slots which = tape != nullptr ? gated::Slots::all : gated::Slots::active;
  const std::span<const Panels<T>> down = prepared.down;

  begin_output(input, y);
  gated::down(routing.lists, which, down, input.x, input.x_rows, hidden, context);
  gated::mix<T>(routing.token_begin, routing.expert, routing.gate, config_.scale, hidden,
                scratch.mixed, input.y_rows, context);
  const gated::Rows rows = gated::used_rows<T>(routing.token_begin, routing.gate, input.y_rows,
                                               gated::Slots::active, scratch.rows);
  gated::multiply<T>(rows, scratch.mixed, prepared.up, true, y, context);
}

template <class T>
void SharedUpBank<T>::backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                               const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                               const BankInputGradient<T>& d_input, const Params<T>& grad,
                               const Context& context) const {
  check_params(weights, false);
  check_params(grad, true);
  require_bank_call<T>(input, routing, dy, dgate, d_input, experts(), config_.in, config_.out);
  if (routing.slots() == 0) return;
  check_tape(saved, routing.slots());
  Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, dy.rows, routing.slots(), true);
  const SlotLists& lists = routing.lists;
  const std::span<const T> scale = config_.scale;
  const auto rows = [&](gated::Slots which) {
    return gated::used_rows<T>(routing.token_begin, routing.gate, input.y_rows, which,
                               scratch.rows);
  };
  for (Index e = 0; e < experts(); ++e) scratch.weights[e] = weights.down_of(e);

  gated::multiply<T>(rows(gated::Slots::all), dy, weights.up, false, scratch.v, context);
  gated::gate_gradient<T>(lists, scale, rank_begin_, saved.hidden, scratch.v, input.y_rows, {}, dy,
                          input.y_rows, dgate, context);
  if (grad.up.data != nullptr) {
    gated::mix<T>(routing.token_begin, routing.expert, routing.gate, scale, saved.hidden,
                  scratch.mixed, input.y_rows, context);
    gated::outer<T>(rows(gated::Slots::active), dy, scratch.mixed, grad.up, context);
  }
  const MatView<T> dhidden = scratch.hidden;
  gated::apply_gates<T>(lists, routing.gate, scale, rank_begin_, scratch.v, input.y_rows, dhidden,
                        context);
  if (!grad.down.empty()) {
    for (Index e = 0; e < experts(); ++e) scratch.gradients[e] = grad.down_of(e);
    gated::down_gradient<T>(lists, dhidden, input.x, input.x_rows, scratch.gradients, context);
  }
  if (d_input.x.data != nullptr) {
    gated::down_transposed<T>(lists, dhidden, scratch.weights, d_input.x, input.x_rows, context);
  }
}

#ifndef MOLE_HEADER_ONLY
extern template class SharedUpBank<float>;
extern template class SharedUpBank<double>;
#endif

static_assert(ExpertBank<SharedUpBank<float>>);

}  // namespace mole::inline MOLE_ABI

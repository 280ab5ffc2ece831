// SPDX-License-Identifier: Apache-2.0
// SharedDownBank: low-rank experts that share A (Tian et al., "HydraLoRA", NeurIPS 2024).
//
//   y_t += Σ_e q_te B_e (A x_t)     q_te = gate_te · scale_e, rounded
//
//   x [tokens, in]   A = down [rank, in]   B_e = up [out, rank]
//
// A x is computed once per token. One output element is one chain of fused multiply-adds that
// starts from the host's y and runs over the active experts of the token, ascending, and the ranks,
// with h' = q · (A x) rounded: the bits of LoraBank with A repeated.
//
// Backward, with h = A x, v_e = B_eᵀ dy, u_t = Σ_e q_te v_te:
//   dgate = scale (v_e·h)   dB_e += Σ_t q dy hᵀ   dA += Σ_t u xᵀ   dx += Aᵀ u
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
struct SharedDownBankParams {
  MatView<V> down = {};         ///< [rank, in]; a gradient without it keeps the shape, no data
  Index out = 0;                ///< output width
  std::span<V* const> up = {};  ///< [experts], each [out, rank]
  Index up_stride = 0;          ///< elements between rows of up; 0: contiguous

  MatView<V> up_of(Index e) const noexcept {
    return {up[e], out, down.rows, up_stride != 0 ? up_stride : down.rows};
  }
  operator SharedDownBankParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {down, out, up, up_stride};
  }

  template <class F, class P, class... More>
  static void visit(F&& f, P& p, More&... more) {
    f(Leaf{"down"}, p.down, more.down...);
    for (Index e = 0; e < static_cast<Index>(p.up.size()); ++e) {
      f(Leaf{"up", e}, std::as_const(p).up_of(e), std::as_const(more).up_of(e)...);
    }
  }
};

template <class T>
class SharedDownBank : public BankMemory<SharedDownBank<T>> {
 public:
  using Scalar = T;
  template <class V>
  using Params = SharedDownBankParams<V>;
  using Weights = Params<const T>;

  struct Config {
    Index in = 0;          ///< input width
    Index out = 0;         ///< output width
    Index rank = 0;        ///< rank of A and of every B, 0 or more
    std::vector<T> scale;  ///< [experts], alpha / rank

    static constexpr std::string_view kind() noexcept { return "shared_down_bank"; }
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
    Panels<T> down;  ///< Aᵀ [in, rank]
    Panels<T> up;    ///< all B_eᵀ one above the other [experts * rank, out]
  };

  struct Tape {
    MatView<T> hidden;  ///< [max rows of x, rank], A x

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(Leaf{"hidden"}, p.hidden...);
    }
  };

  static constexpr bool needs_base = false;

  /// Throws invalid_argument naming the field.
  explicit SharedDownBank(Config config);

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
    std::span<std::int32_t> rows;         // rows of x in use
    MatView<T> hidden;                    // [rows of x, rank], A x, then u
    MatView<T> scaled, v;                 // [slots, rank], q h and B_eᵀ dy
    std::span<MatView<const T>> weights;  // [experts], B_e
    std::span<MatView<T>> gradients;      // [experts], dB_e
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, Index x_rows, Index slots, bool backward) const;
  template <class V>
  void check_params(const Params<V>& params, bool optional) const;
  void check_tape(const Tape& tape, Index rows) const;

  Config config_;
  std::vector<Index> rank_begin_;  // [experts + 1], first row of each expert in Prepared::up
};

template <class T>
SharedDownBank<T>::SharedDownBank(Config config) : config_(std::move(config)) {
  require(config_.in > 0, Errc::invalid_argument, "SharedDownBank: in must be positive, got ",
          config_.in);
  require(config_.out > 0, Errc::invalid_argument, "SharedDownBank: out must be positive, got ",
          config_.out);
  require(config_.rank >= 0, Errc::invalid_argument,
          "SharedDownBank: rank must not be negative, got ", config_.rank);
  require(!config_.scale.empty(), Errc::invalid_argument,
          "SharedDownBank: scale must name an expert");
  for (Index e = 0; e <= experts(); ++e) rank_begin_.push_back(e * config_.rank);
}

template <class T>
template <class V, class Arena>
auto SharedDownBank<T>::take_params(Arena& arena) const -> Params<V> {
  Params<V> params;
  params.down = arena.template take<V>(config_.rank, config_.in);
  params.out = config_.out;
  const std::span<V*> up = arena.template take<V*>(experts());
  for (Index e = 0; e < experts(); ++e) {
    const MatView<V> block = arena.template take<V>(config_.out, config_.rank);
    if (!up.empty()) up[e] = block.data;
  }
  params.up = up;
  return params;
}

template <class T>
template <class Arena>
auto SharedDownBank<T>::take_prepared(Arena& arena) const -> Prepared {
  Prepared prepared;
  prepared.down = take_panels<T>(arena, config_.in, config_.rank);
  prepared.up = take_panels<T>(arena, rank_begin_.back(), config_.out);
  return prepared;
}

template <class T>
template <class Arena>
auto SharedDownBank<T>::take_tape(Arena& arena, Index max_tokens, Index max_slots) const -> Tape {
  return {arena.template take<T>(std::max(max_tokens, max_slots), config_.rank)};
}

template <class T>
template <class V>
void SharedDownBank<T>::check_params(const Params<V>& params, bool optional) const {
  if (!optional || params.down.data != nullptr) {
    require_shape("SharedDownBank down", params.down, config_.rank, config_.in);
  }
  if (optional && params.up.empty()) return;
  require(params.out == config_.out && static_cast<Index>(params.up.size()) == experts(),
          Errc::shape_mismatch, "SharedDownBank up: expected ", experts(), " experts of width ",
          config_.out, ", got ", params.up.size(), " of width ", params.out);
  for (Index e = 0; e < experts(); ++e) {
    require_shape("SharedDownBank up", params.up_of(e), config_.out, config_.rank);
  }
}

template <class T>
void SharedDownBank<T>::check_tape(const Tape& tape, Index rows) const {
  require(tape.hidden.rows >= rows && tape.hidden.cols == config_.rank, Errc::out_of_memory,
          "SharedDownBank: the tape holds ", tape.hidden.rows, " rows of rank ", tape.hidden.cols,
          ", expected ", rows, " of rank ", config_.rank);
}

template <class T>
auto SharedDownBank<T>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  check_params(weights, false);
  const Prepared prepared = take_prepared(memory);
  pack_rows(weights.down, 0, prepared.down);
  for (Index e = 0; e < experts(); ++e) pack_rows(weights.up_of(e), rank_begin_[e], prepared.up);
  return prepared;
}

template <class T>
template <class Arena>
auto SharedDownBank<T>::take_scratch(Arena& arena, Index x_rows, Index slots, bool backward) const
    -> Scratch {
  Scratch scratch;
  scratch.rows = arena.template take<std::int32_t>(x_rows);
  scratch.hidden = arena.template take<T>(x_rows, config_.rank);
  scratch.scaled = arena.template take<T>(slots, config_.rank);
  if (!backward) return scratch;
  scratch.v = arena.template take<T>(slots, config_.rank);
  scratch.weights = arena.template take<MatView<const T>>(experts());
  scratch.gradients = arena.template take<MatView<T>>(experts());
  return scratch;
}

template <class T>
std::size_t SharedDownBank<T>::scratch_bytes(Index max_tokens, Index max_slots,
                                             int) const noexcept {
  ByteCounter counter;
  take_scratch(counter, std::max(max_tokens, max_slots), max_slots, true);
  return counter.bytes();
}

template <class T>
void SharedDownBank<T>::forward(const Prepared& prepared, const BankInput<T>& input,
                                const Routing<T>& routing, MatView<T> y, Tape* tape,
                                const Context& context) const {
  require_bank_call<T>(input, routing, y, experts(), config_.in, config_.out);
  if (routing.slots() == 0) return begin_output(input, y);
  if (tape != nullptr) check_tape(*tape, input.x.rows);
  Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, input.x.rows, routing.slots(), false);
  const MatView<T> hidden = tape != nullptr ? tape->hidden : scratch.hidden;
  const gated::Slots which = tape != nullptr ? gated::Slots::all : gated::Slots::active;
  const std::span<const T> scale = config_.scale;
  const std::span<const Index> ranks = rank_begin_;

  begin_output(input, y);
  const gated::Rows rows =
      gated::used_rows<T>(routing.token_begin, routing.gate, input.x_rows, which, scratch.rows);
  gated::multiply<T>(rows, input.x, prepared.down, false, hidden, context);
  gated::apply_gates<T>(routing.lists, routing.gate, scale, ranks, hidden, input.x_rows,
                        scratch.scaled, context);
  gated::up<T>(routing.lists, routing.gate, scale, scratch.scaled, prepared.up, ranks, {}, y,
               input.y_rows, context);
}

template <class T>
void SharedDownBank<T>::backward(const Weights& weights, const Tape& saved,
                                 const BankInput<T>& input, const Routing<T>& routing,
                                 MatView<const T> dy, std::span<T> dgate,
                                 const BankInputGradient<T>& d_input, const Params<T>& grad,
                                 const Context& context) const {
  check_params(weights, false);
  check_params(grad, true);
  require_bank_call<T>(input, routing, dy, dgate, d_input, experts(), config_.in, config_.out);
  if (routing.slots() == 0) return;
  check_tape(saved, input.x.rows);
  Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, input.x.rows, routing.slots(), true);
  const SlotLists& lists = routing.lists;
  const std::span<const T> scale = config_.scale;
  for (Index e = 0; e < experts(); ++e) scratch.weights[e] = weights.up_of(e);

  gated::up_transposed<T>(lists, scratch.weights, dy, input.y_rows, scratch.v, context);
  gated::gate_gradient<T>(lists, scale, rank_begin_, scratch.v, saved.hidden, input.x_rows, {}, dy,
                          input.y_rows, dgate, context);
  if (!grad.up.empty()) {
    for (Index e = 0; e < experts(); ++e) scratch.gradients[e] = grad.up_of(e);
    gated::apply_gates<T>(lists, routing.gate, scale, rank_begin_, saved.hidden, input.x_rows,
                          scratch.scaled, context);
    gated::up_gradient<T>(lists, dy, input.y_rows, scratch.scaled, scratch.gradients, context);
  }
  const MatView<T> u = scratch.hidden;
  gated::mix<T>(routing.token_begin, routing.expert, routing.gate, scale, scratch.v, u,
                input.x_rows, context);
  const gated::Rows rows = gated::used_rows<T>(routing.token_begin, routing.gate, input.x_rows,
                                               gated::Slots::active, scratch.rows);
  if (grad.down.data != nullptr) gated::outer<T>(rows, u, input.x, grad.down, context);
  if (d_input.x.data != nullptr) {
    gated::multiply<T>(rows, u, weights.down, true, d_input.x, context);
  }
}

#ifndef MOLE_HEADER_ONLY
extern template class SharedDownBank<float>;
extern template class SharedDownBank<double>;
#endif

static_assert(ExpertBank<SharedDownBank<float>>);

}  // namespace mole::inline MOLE_ABI

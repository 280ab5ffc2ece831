// SPDX-License-Identifier: Apache-2.0
// LoraBank: independent low-rank experts (Hu et al., "LoRA", ICLR 2022, one per expert).
//
//   y_t += Σ_e q_te (B_e A_e x_t + β_e)     q_te = gate_te · scale_e, rounded
//
//   x [tokens, in]   A_e = down [r_e, in]   B_e = up [out, r_e]   β_e = bias [out] (optional)
//
// Ranks may differ, rank 0 is legal. One output element is one chain of fused multiply-adds that
// starts from the host's y and runs over the active experts of the token, ascending, and their
// ranks, with h' = q · (A x) rounded. Rank-wise gates are the case of experts of rank 1.
//
// Backward, with h = A_e x, v = B_eᵀ dy:
//   dgate = scale (v·h + β·dy)   dB_e += q dy hᵀ   dA_e += q v xᵀ   dβ_e += q dy   dx += q A_eᵀ v
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/half.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/bank_memory.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/kernels/chain_product.hpp"
#include "mole/kernels/gated_low_rank.hpp"

namespace mole::inline MOLE_ABI {

/// Which loops run in forward; both give the same bits. `automatic` takes the dense loops when
/// every token uses every expert.
enum class BankPath { automatic, sparse, dense };
constexpr std::array<std::string_view, 3> enum_names(BankPath) noexcept {
  return {"automatic", "sparse", "dense"};
}

/// Pointers to the matrices of every expert. They may lie anywhere (one block, or one tensor per
/// adapter); `strides` of 0 mean contiguous matrices.
template <class V>
struct LoraBankParams {
  Index in = 0, out = 0;
  std::span<const Index> rank = {};  ///< [experts]
  std::span<V* const> down = {};     ///< [experts], each [rank, in]
  std::span<V* const> up = {};       ///< [experts], each [out, rank]
  std::span<V* const> bias = {};     ///< [experts], each [out]; empty: none
  Index down_stride = 0;             ///< elements between rows of down
  Index up_stride = 0;               ///< elements between rows of up

  /// The matrices of expert e; empty where there is none.
  MatView<V> down_of(Index e) const noexcept {
    if (!has(down, e)) return {};
    return {down[e], rank[e], in, down_stride != 0 ? down_stride : in};
  }
  MatView<V> up_of(Index e) const noexcept {
    if (!has(up, e)) return {};
    return {up[e], out, rank[e], up_stride != 0 ? up_stride : rank[e]};
  }
  MatView<V> bias_of(Index e) const noexcept {
    if (!has(bias, e)) return {};
    return {bias[e], 1, out};
  }
  operator LoraBankParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {in, out, rank, down, up, bias, down_stride, up_stride};
  }

  template <class F, class P, class... More>
  static void visit(F&& f, P& p, More&... more) {
    for (Index e = 0; e < static_cast<Index>(p.rank.size()); ++e) {
      f(Leaf{"down", e}, as_lvalue(p.down_of(e)), as_lvalue(more.down_of(e))...);
      f(Leaf{"up", e}, as_lvalue(p.up_of(e)), as_lvalue(more.up_of(e))...);
      if (!p.bias.empty())
        f(Leaf{"bias", e}, as_lvalue(p.bias_of(e)), as_lvalue(more.bias_of(e))...);
    }
  }

 private:
  bool has(std::span<V* const> list, Index e) const noexcept {
    return e < static_cast<Index>(list.size()) && e < static_cast<Index>(rank.size());
  }
  template <class View>
  static const View& as_lvalue(const View& view) noexcept {
    return view;
  }
};

/// T: compute type. W: storage type of the weights (T, bf16, f16, or the other of float and
/// double).
template <class T, class W = T>
class LoraBank : public BankMemory<LoraBank<T, W>> {
 public:
  using Scalar = T;
  using Storage = W;  ///< of the weights
  template <class V>
  using Params = LoraBankParams<V>;
  using Weights = Params<const W>;

  struct Config {
    Index in = 0;             ///< input width
    Index out = 0;            ///< output width
    std::vector<Index> rank;  ///< [experts], 0 or more
    std::vector<T> scale;     ///< [experts], alpha / r, or alpha / sqrt(r) for rsLoRA
    bool bias = false;        ///< experts have a bias (PEFT's lora_bias)
    BankPath path = BankPath::automatic;

    static constexpr std::string_view kind() noexcept { return "lora_bank"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("in"), c.in...);
      f(Field::required("out"), c.out...);
      f(Field::required("rank"), c.rank...);
      f(Field::required("scale"), c.scale...);
      f(Field{"bias"}, c.bias...);
      f(Field{"path"}, c.path...);
    }
  };

  /// Packed snapshot of the weights, widened to T. Immutable; any number of calls may share it.
  struct Prepared {
    std::span<Panels<T>> down;  ///< [experts], Aᵀ [in, rank]
    Panels<T> up;               ///< all Bᵀ one above the other [total rank, out]
    MatView<T> bias;            ///< [experts, out], or empty
  };

  struct Tape {
    MatView<T> hidden;  ///< [max slots, largest rank], A x

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(Leaf{"hidden"}, p.hidden...);
    }
  };

  static constexpr bool needs_base = false;

  /// Throws invalid_argument naming the field.
  explicit LoraBank(Config config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.in; }
  Index output_width() const noexcept { return config_.out; }
  Index experts() const noexcept { return static_cast<Index>(config_.rank.size()); }
  Index total_rank() const noexcept { return rank_begin_.back(); }
  Index largest_rank() const noexcept { return largest_rank_; }

  template <class V, class Arena>
  Params<V> take_params(Arena& arena) const;
  template <class Arena>
  Prepared take_prepared(Arena& arena) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index max_tokens, Index max_slots) const;
  std::size_t scratch_bytes(Index max_tokens, Index max_slots, int workers) const noexcept;

  /// Throws shape_mismatch unless the weights are those of the config.
  Prepared prepare(const Weights& weights, Workspace& memory) const;
  /// The same into what take_prepared laid out, of weights that fit.
  void pack(const Weights& weights, const Prepared& prepared) const noexcept;

  /// Adds into y. Throws before any write on wrong shapes or too little scratch.
  void forward(const Prepared& prepared, const BankInput<T>& input, const Routing<T>& routing,
               MatView<T> y, Tape* tape, const Context& context) const;

  /// Adds into dgate [slots], d_input.x if given, and grad (all its tensors, or none of a kind when
  /// its pointer list is empty).
  void backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                const BankInputGradient<T>& d_input, const Params<T>& grad,
                const Context& context) const;

  /// Throws shape_mismatch unless the parameters fit the config; what is optional may be empty.
  template <class V>
  void check_params(std::string_view what, const Params<V>& params, bool optional) const;
  /// Throws out_of_memory unless the tape holds that many slots.
  void check_tape(const Tape& tape, Index slots) const;

 private:
  /// Scratch of forward and backward. Ranks are those of one slot row.
  struct Scratch {
    MatView<T> scaled;                        // [slots, largest rank], q h
    MatView<T> dscaled;                       // [slots, largest rank], v, then q v
    std::span<MatView<const T>> down, up;     // [experts], weights as T
    std::span<MatView<const T>> bias;         // [experts], or empty
    std::span<MatView<T>> ddown, dup, dbias;  // [experts], gradients
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, Index slots, bool backward) const;

  bool takes_dense_path(const BankInput<T>& input, const Routing<T>& routing,
                        const Tape* tape) const noexcept;
  void widen_weights(const Weights& weights, const Scratch& scratch, Workspace& memory) const;

  Config config_;
  std::vector<Index> rank_begin_;  // [experts + 1], first row of each expert in Prepared::up
  Index largest_rank_ = 0;
};

template <class T, class W>
LoraBank<T, W>::LoraBank(Config config) : config_(std::move(config)), rank_begin_{0} {
  require(config_.in > 0, Errc::invalid_argument, "LoraBank: in must be positive, got ",
          config_.in);
  require(config_.out > 0, Errc::invalid_argument, "LoraBank: out must be positive, got ",
          config_.out);
  constexpr Index kLimit = Index{1} << 31;  // so that products of two sizes fit
  require(config_.in <= kLimit && config_.out <= kLimit, Errc::limit_exceeded, "LoraBank: in ",
          config_.in, " and out ", config_.out, ", the limit is ", kLimit);
  require(!config_.rank.empty(), Errc::invalid_argument, "LoraBank: rank must name an expert");
  require(config_.rank.size() == config_.scale.size(), Errc::invalid_argument,
          "LoraBank: rank has ", config_.rank.size(), " experts, scale has ", config_.scale.size());
  for (const Index rank : config_.rank) {
    require(rank >= 0, Errc::invalid_argument, "LoraBank: rank must not be negative, got ", rank);
    require(rank <= kLimit - rank_begin_.back(), Errc::limit_exceeded,
            "LoraBank: the ranks add up to more than ", kLimit);
    rank_begin_.push_back(rank_begin_.back() + rank);
    largest_rank_ = std::max(largest_rank_, rank);
  }
}

template <class T, class W>
template <class V, class Arena>
auto LoraBank<T, W>::take_params(Arena& arena) const -> Params<V> {
  const auto pointers = [&](bool wanted, auto&& elements_of) -> std::span<V* const> {
    if (!wanted) return {};
    const std::span<V*> list = arena.template take<V*>(experts());
    for (Index e = 0; e < experts(); ++e) {
      const std::span<V> block = arena.template take<V>(elements_of(e));
      if (!list.empty()) list[e] = block.data();
    }
    return list;
  };
  Params<V> params;
  params.in = config_.in;
  params.out = config_.out;
  const std::span<Index> rank = arena.template take<Index>(experts());
  if (!rank.empty()) std::ranges::copy(config_.rank, rank.begin());
  params.rank = rank;
  params.down = pointers(true, [&](Index e) { return config_.rank[e] * config_.in; });
  params.up = pointers(true, [&](Index e) { return config_.rank[e] * config_.out; });
  params.bias = pointers(config_.bias, [&](Index) { return config_.out; });
  return params;
}

template <class T, class W>
template <class Arena>
auto LoraBank<T, W>::take_prepared(Arena& arena) const -> Prepared {
  Prepared prepared;
  prepared.down = arena.template take<Panels<T>>(experts());
  for (Index e = 0; e < experts(); ++e) {
    const Panels<T> panels = take_panels<T>(arena, config_.in, config_.rank[e]);
    if (!prepared.down.empty()) prepared.down[e] = panels;
  }
  prepared.up = take_panels<T>(arena, total_rank(), config_.out);
  if (config_.bias) prepared.bias = arena.template take<T>(experts(), config_.out);
  return prepared;
}

template <class T, class W>
template <class Arena>
auto LoraBank<T, W>::take_tape(Arena& arena, Index, Index max_slots) const -> Tape {
  return {arena.template take<T>(max_slots, largest_rank_)};
}

template <class T, class W>
template <class V>
void LoraBank<T, W>::check_params(std::string_view what, const Params<V>& params,
                                  bool optional) const {
  if (optional && params.down.empty() && params.up.empty() && params.bias.empty()) return;
  require(params.in == config_.in && params.out == config_.out, Errc::shape_mismatch, "LoraBank ",
          what, ": expected ", config_.in, " -> ", config_.out, ", got ", params.in, " -> ",
          params.out);
  require(std::ranges::equal(params.rank, config_.rank), Errc::shape_mismatch, "LoraBank ", what,
          ": the ranks differ from those of the config");
  const auto fits = [&](std::span<V* const> list, bool wanted) {
    const auto expected = static_cast<std::size_t>(wanted ? experts() : 0);
    return list.size() == expected || (optional && list.empty());
  };
  require(fits(params.down, true) && fits(params.up, true) && fits(params.bias, config_.bias),
          Errc::shape_mismatch, "LoraBank ", what, ": expected down, up",
          config_.bias ? ", bias" : "", " of ", experts(), " experts, got ", params.down.size(),
          ", ", params.up.size(), ", ", params.bias.size());
  for (Index e = 0; e < experts(); ++e) {
    const Index rank = config_.rank[e];
    if (!params.down.empty()) require_shape("down", params.down_of(e), rank, config_.in);
    if (!params.up.empty()) require_shape("up", params.up_of(e), config_.out, rank);
    if (!params.bias.empty()) require_shape("bias", params.bias_of(e), 1, config_.out);
  }
}

template <class T, class W>
void LoraBank<T, W>::check_tape(const Tape& tape, Index slots) const {
  require(tape.hidden.rows >= slots && tape.hidden.cols == largest_rank_, Errc::out_of_memory,
          "LoraBank: the tape holds ", tape.hidden.rows, " slots of rank ", tape.hidden.cols,
          ", expected ", slots, " of rank ", largest_rank_);
}

template <class T, class W>
auto LoraBank<T, W>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  check_params("weights", weights, false);
  const Prepared prepared = take_prepared(memory);
  pack(weights, prepared);
  return prepared;
}

template <class T, class W>
void LoraBank<T, W>::pack(const Weights& weights, const Prepared& prepared) const noexcept {
  for (Index e = 0; e < experts(); ++e) {
    pack_rows(weights.down_of(e), 0, prepared.down[e]);
    pack_rows(weights.up_of(e), rank_begin_[e], prepared.up);
    for (Index n = 0; n < prepared.bias.cols; ++n) {
      prepared.bias(e, n) = widen<T>(weights.bias_of(e)(0, n));
    }
  }
}

template <class T, class W>
template <class Arena>
auto LoraBank<T, W>::take_scratch(Arena& arena, Index slots, bool backward) const -> Scratch {
  Scratch scratch;
  scratch.scaled = arena.template take<T>(slots, largest_rank_);
  if (!backward) return scratch;
  scratch.dscaled = arena.template take<T>(slots, largest_rank_);
  scratch.down = arena.template take<MatView<const T>>(experts());
  scratch.up = arena.template take<MatView<const T>>(experts());
  if (config_.bias) scratch.bias = arena.template take<MatView<const T>>(experts());
  scratch.ddown = arena.template take<MatView<T>>(experts());
  scratch.dup = arena.template take<MatView<T>>(experts());
  scratch.dbias = arena.template take<MatView<T>>(experts());
  return scratch;
}

template <class T, class W>
std::size_t LoraBank<T, W>::scratch_bytes(Index, Index max_slots, int) const noexcept {
  ByteCounter counter;
  take_scratch(counter, max_slots, true);
  if constexpr (!std::is_same_v<T, W>) take_params<T>(counter);
  return counter.bytes();
}

template <class T, class W>
bool LoraBank<T, W>::takes_dense_path(const BankInput<T>& input, const Routing<T>& routing,
                                      const Tape* tape) const noexcept {
  const bool by_token = input.x_rows == RowsBy::token && input.y_rows == RowsBy::token;
  return config_.path != BankPath::sparse && tape == nullptr && by_token && !config_.bias &&
         routing.is_dense();
}

template <class T, class W>
void LoraBank<T, W>::forward(const Prepared& prepared, const BankInput<T>& input,
                             const Routing<T>& routing, MatView<T> y, Tape* tape,
                             const Context& context) const {
  require_bank_call<T>(input, routing, y, experts(), config_.in, config_.out);
  if (routing.slots() == 0) return begin_output(input, y);
  if (tape != nullptr) check_tape(*tape, routing.slots());
  Workspace::Frame frame(context.scratch);
  const std::span<const Panels<T>> down = prepared.down;
  const std::span<const T> scale = config_.scale;
  const std::span<const Index> ranks = rank_begin_;
  if (takes_dense_path(input, routing, tape)) {
    const MatView<T> hidden = context.scratch.take<T>(routing.tokens, total_rank());
    const MatView<const T> gate(routing.gate.data(), routing.tokens, routing.experts);
    begin_output(input, y);
    gated::dense_forward(gate, scale, input.x, down, prepared.up, ranks, hidden, y, context);
    return;
  }
  const MatView<T> scaled = take_scratch(context.scratch, routing.slots(), false).scaled;
  const MatView<T> hidden = tape != nullptr ? tape->hidden : scaled;
  const gated::Slots which = tape != nullptr ? gated::Slots::all : gated::Slots::active;
  begin_output(input, y);
  gated::down(routing.lists, which, down, input.x, input.x_rows, hidden, context);
  gated::apply_gates<T>(routing.lists, routing.gate, scale, ranks, hidden, RowsBy::slot, scaled,
                        context);
  gated::up<T>(routing.lists, routing.gate, scale, scaled, prepared.up, ranks, prepared.bias, y,
               input.y_rows, context);
}

template <class T, class W>
void LoraBank<T, W>::widen_weights(const Weights& weights, const Scratch& scratch,
                                   Workspace& memory) const {
  if constexpr (std::is_same_v<T, W>) {
    for (Index e = 0; e < experts(); ++e) {
      scratch.down[e] = weights.down_of(e);
      scratch.up[e] = weights.up_of(e);
      if (config_.bias) scratch.bias[e] = weights.bias_of(e);
    }
  } else {
    const Params<T> wide = take_params<T>(memory);
    for (Index e = 0; e < experts(); ++e) {
      const auto copy = [](MatView<const W> from, MatView<T> to) {
        for (Index r = 0; r < to.rows; ++r) {
          for (Index c = 0; c < to.cols; ++c) to(r, c) = widen<T>(from(r, c));
        }
        return to;
      };
      scratch.down[e] = copy(weights.down_of(e), wide.down_of(e));
      scratch.up[e] = copy(weights.up_of(e), wide.up_of(e));
      if (config_.bias) scratch.bias[e] = copy(weights.bias_of(e), wide.bias_of(e));
    }
  }
}

template <class T, class W>
void LoraBank<T, W>::backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                              const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                              const BankInputGradient<T>& d_input, const Params<T>& grad,
                              const Context& context) const {
  check_params("weights", weights, false);
  check_params("gradient", grad, true);
  require_bank_call<T>(input, routing, dy, dgate, d_input, experts(), config_.in, config_.out);
  if (routing.slots() == 0) return;
  check_tape(saved, routing.slots());
  Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, routing.slots(), true);
  widen_weights(weights, scratch, context.scratch);
  const SlotLists& lists = routing.lists;
  const std::span<const T> scale = config_.scale;
  const std::span<const Index> ranks = rank_begin_;
  const MatView<T> v = scratch.dscaled;

  gated::up_transposed<T>(lists, scratch.up, dy, input.y_rows, v, context);
  gated::gate_gradient<T>(lists, scale, ranks, v, saved.hidden, RowsBy::slot, scratch.bias, dy,
                          input.y_rows, dgate, context);
  gated::apply_gates<T>(lists, routing.gate, scale, ranks, saved.hidden, RowsBy::slot,
                        scratch.scaled, context);
  gated::apply_gates<T>(lists, routing.gate, scale, ranks, v, RowsBy::slot, v, context);
  for (Index e = 0; e < experts(); ++e) {
    if (!grad.down.empty()) scratch.ddown[e] = grad.down_of(e);
    if (!grad.up.empty()) scratch.dup[e] = grad.up_of(e);
    if (!grad.bias.empty()) scratch.dbias[e] = grad.bias_of(e);
  }
  if (!grad.up.empty()) {
    gated::up_gradient<T>(lists, dy, input.y_rows, scratch.scaled, scratch.dup, context);
  }
  if (!grad.bias.empty()) {
    gated::bias_gradient<T>(lists, routing.gate, scale, dy, input.y_rows, scratch.dbias, context);
  }
  if (!grad.down.empty()) {
    gated::down_gradient<T>(lists, v, input.x, input.x_rows, scratch.ddown, context);
  }
  if (d_input.x.data != nullptr) {
    gated::down_transposed<T>(lists, v, scratch.down, d_input.x, input.x_rows, context);
  }
}

#ifndef MOLE_HEADER_ONLY
extern template class LoraBank<float>;
extern template class LoraBank<double>;
extern template class LoraBank<float, bf16>;
extern template class LoraBank<float, f16>;
extern template class LoraBank<float, double>;
extern template class LoraBank<double, float>;
#endif

static_assert(ExpertBank<LoraBank<float>>);

}  // namespace mole::inline MOLE_ABI

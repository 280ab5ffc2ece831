// SPDX-License-Identifier: Apache-2.0
// ModulatedBank: one low-rank adapter that every expert modulates in the middle (FiLM).
//
//   y_t += B z_t     z_t = Σ_e q_te (γ_e ∘ A x_t + β_e)     q_te = gate_te · scale_e, rounded
//
//   x [tokens, in]   A = down [rank, in]   B = up [out, rank]   γ, β = gamma, beta [experts, rank]
//
// The products with A and B are computed once per token. z is one chain of fused multiply-adds from
// 0 over the active experts of the token, ascending; y is one chain that starts from the host's y
// and runs over the ranks.
//
// Backward, with h = A x, m_e = γ_e ∘ h + β_e, v = Bᵀ dy:
//   dgate = scale (v·m_e)   dγ_e += Σ_t q v ∘ h   dβ_e += Σ_t q v   dB += Σ_t dy zᵀ
//   dh = Σ_e q v ∘ γ_e      dA += Σ_t dh xᵀ       dx += Aᵀ dh
//
// After the modulated experts of Zhang et al., "Efficient Deweather Mixture-of-Experts with
// Uncertainty-Aware Feature-Wise Linear Modulation" (MoFME), AAAI 2024, put inside an adapter.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/bank_memory.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/kernels/chain_product.hpp"
#include "mole/kernels/gated_low_rank.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/kernels/shared_low_rank.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct ModulatedBankParams {
  MatView<V> down = {};   ///< A [rank, in]
  MatView<V> up = {};     ///< B [out, rank]
  MatView<V> gamma = {};  ///< [experts, rank]
  MatView<V> beta = {};   ///< [experts, rank]

  operator ModulatedBankParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {down, up, gamma, beta};
  }

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"down"}, p.down...);
    f(Leaf{"up"}, p.up...);
    f(Leaf{"gamma"}, p.gamma...);
    f(Leaf{"beta"}, p.beta...);
  }
};

template <class T>
class ModulatedBank : public BankMemory<ModulatedBank<T>> {
 public:
  using Scalar = T;
  template <class V>
  using Params = ModulatedBankParams<V>;
  using Weights = Params<const T>;

  struct Config {
    Index in = 0;          ///< input width
    Index out = 0;         ///< output width
    Index rank = 0;        ///< of A and B, 0 or more
    std::vector<T> scale;  ///< [experts], alpha / rank

    static constexpr std::string_view kind() noexcept { return "modulated_bank"; }
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
    Panels<T> down;          ///< Aᵀ [in, rank]
    Panels<T> up;            ///< Bᵀ [rank, out]
    MatView<T> gamma, beta;  ///< copies
  };

  struct Tape {
    MatView<T> hidden;     ///< [max slots, rank], γ_e ∘ A x + β_e
    MatView<T> projected;  ///< [max rows of x, rank], A x

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(Leaf{"hidden"}, p.hidden...);
      f(Leaf{"projected"}, p.projected...);
    }
  };

  static constexpr bool needs_base = false;

  /// Throws invalid_argument naming the field.
  explicit ModulatedBank(Config config);

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

  /// Adds into dgate [slots], d_input.x if given, and the members of grad if given.
  void backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                const BankInputGradient<T>& d_input, const Params<T>& grad,
                const Context& context) const;

 private:
  struct Scratch {
    std::span<std::int32_t> rows;  // rows of y, or of x, in use
    MatView<T> mixed;              // [rows of y, rank], z
    MatView<T> hidden;             // [slots, rank], m, then q v
    MatView<T> projected;          // [rows of x, rank], A x, then its gradient
    MatView<T> v;                  // [rows of y, rank], Bᵀ dy
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, Index x_rows, Index y_rows, Index slots, bool backward) const;
  template <class V>
  void check_params(const Params<V>& params, bool optional) const;
  void check_tape(const Tape& tape, Index slots, Index x_rows) const;
  void modulate(const Prepared& prepared, const Routing<T>& routing, RowsBy x_rows,
                MatView<const T> projected, MatView<T> hidden, const Context& context) const;
  void modulate_backward(const Weights& weights, const Routing<T>& routing, RowsBy x_rows,
                         MatView<const T> projected, MatView<const T> dhidden,
                         MatView<T> dprojected, const Params<T>& grad) const;

  Config config_;
  std::vector<Index> rank_begin_;  // [experts + 1], multiples of the rank
};

template <class T>
ModulatedBank<T>::ModulatedBank(Config config) : config_(std::move(config)) {
  require(config_.in > 0, Errc::invalid_argument, "ModulatedBank: in must be positive, got ",
          config_.in);
  require(config_.out > 0, Errc::invalid_argument, "ModulatedBank: out must be positive, got ",
          config_.out);
  require(config_.rank >= 0, Errc::invalid_argument,
          "ModulatedBank: rank must not be negative, got ", config_.rank);
  require(!config_.scale.empty(), Errc::invalid_argument,
          "ModulatedBank: scale must name an expert");
  for (Index e = 0; e <= experts(); ++e) rank_begin_.push_back(e * config_.rank);
}

template <class T>
template <class V, class Arena>
auto ModulatedBank<T>::take_params(Arena& arena) const -> Params<V> {
  Params<V> params;
  params.down = arena.template take<V>(config_.rank, config_.in);
  params.up = arena.template take<V>(config_.out, config_.rank);
  params.gamma = arena.template take<V>(experts(), config_.rank);
  params.beta = arena.template take<V>(experts(), config_.rank);
  return params;
}

template <class T>
template <class Arena>
auto ModulatedBank<T>::take_prepared(Arena& arena) const -> Prepared {
  Prepared prepared;
  prepared.down = take_panels<T>(arena, config_.in, config_.rank);
  prepared.up = take_panels<T>(arena, config_.rank, config_.out);
  prepared.gamma = arena.template take<T>(experts(), config_.rank);
  prepared.beta = arena.template take<T>(experts(), config_.rank);
  return prepared;
}

template <class T>
template <class Arena>
auto ModulatedBank<T>::take_tape(Arena& arena, Index max_tokens, Index max_slots) const -> Tape {
  Tape tape;
  tape.hidden = arena.template take<T>(max_slots, config_.rank);
  tape.projected = arena.template take<T>(std::max(max_tokens, max_slots), config_.rank);
  return tape;
}

template <class T>
template <class V>
void ModulatedBank<T>::check_params(const Params<V>& params, bool optional) const {
  const auto fits = [&](const char* name, MatView<V> view, Index rows, Index cols) {
    if (!optional || view.data != nullptr) require_shape(name, view, rows, cols);
  };
  fits("ModulatedBank down", params.down, config_.rank, config_.in);
  fits("ModulatedBank up", params.up, config_.out, config_.rank);
  fits("ModulatedBank gamma", params.gamma, experts(), config_.rank);
  fits("ModulatedBank beta", params.beta, experts(), config_.rank);
}

template <class T>
void ModulatedBank<T>::check_tape(const Tape& tape, Index slots, Index x_rows) const {
  require(tape.hidden.rows >= slots && tape.hidden.cols == config_.rank &&
              tape.projected.rows >= x_rows && tape.projected.cols == config_.rank,
          Errc::out_of_memory, "ModulatedBank: the tape holds ", tape.hidden.rows, " slots and ",
          tape.projected.rows, " rows of rank ", tape.hidden.cols, ", expected ", slots, " and ",
          x_rows, " of rank ", config_.rank);
}

template <class T>
auto ModulatedBank<T>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  check_params(weights, false);
  const Prepared prepared = take_prepared(memory);
  pack_rows(weights.down, 0, prepared.down);
  pack_rows(weights.up, 0, prepared.up);
  rows::copy(weights.gamma, prepared.gamma);
  rows::copy(weights.beta, prepared.beta);
  return prepared;
}

template <class T>
template <class Arena>
auto ModulatedBank<T>::take_scratch(Arena& arena, Index x_rows, Index y_rows, Index slots,
                                    bool backward) const -> Scratch {
  Scratch scratch;
  scratch.rows = arena.template take<std::int32_t>(std::max(x_rows, y_rows));
  scratch.mixed = arena.template take<T>(y_rows, config_.rank);
  scratch.hidden = arena.template take<T>(slots, config_.rank);
  scratch.projected = arena.template take<T>(x_rows, config_.rank);
  if (backward) scratch.v = arena.template take<T>(y_rows, config_.rank);
  return scratch;
}

template <class T>
std::size_t ModulatedBank<T>::scratch_bytes(Index max_tokens, Index max_slots, int) const noexcept {
  const Index rows = std::max(max_tokens, max_slots);
  ByteCounter counter;
  take_scratch(counter, rows, rows, max_slots, true);
  return counter.bytes();
}

template <class T>
void ModulatedBank<T>::modulate(const Prepared& prepared, const Routing<T>& routing, RowsBy x_rows,
                                MatView<const T> projected, MatView<T> hidden,
                                const Context& context) const {
  const auto token = [&](Index t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      const Index row = x_rows == RowsBy::token ? t : s, e = routing.expert[s];
      for (Index i = 0; i < config_.rank; ++i) {
        hidden(s, i) = std::fma(prepared.gamma(e, i), projected(row, i), prepared.beta(e, i));
      }
    }
  };
  parallel_for(context, routing.tokens, gated::grain_for(config_.rank),
               [&](Index begin, Index end, int) {
                 for (Index t = begin; t < end; ++t) token(t);
               });
}

template <class T>
void ModulatedBank<T>::forward(const Prepared& prepared, const BankInput<T>& input,
                               const Routing<T>& routing, MatView<T> y, Tape* tape,
                               const Context& context) const {
  require_bank_call<T>(input, routing, y, experts(), config_.in, config_.out);
  if (routing.slots() == 0) return begin_output(input, y);
  if (tape != nullptr) check_tape(*tape, routing.slots(), input.x.rows);
  Workspace::Frame frame(context.scratch);
  const Scratch scratch =
      take_scratch(context.scratch, input.x.rows, y.rows, routing.slots(), false);
  const MatView<T> hidden = tape != nullptr ? tape->hidden : scratch.hidden;
  const MatView<T> projected = tape != nullptr ? tape->projected : scratch.projected;
  const auto rows = [&](RowsBy by, gated::Slots which) {
    return gated::used_rows<T>(routing.token_begin, routing.gate, by, which, scratch.rows);
  };

  begin_output(input, y);
  gated::multiply<T>(rows(input.x_rows, gated::Slots::all), input.x, prepared.down, false,
                     projected, context);
  modulate(prepared, routing, input.x_rows, projected, hidden, context);
  gated::mix<T>(routing.token_begin, routing.expert, routing.gate, config_.scale, hidden,
                scratch.mixed, input.y_rows, context);
  gated::multiply<T>(rows(input.y_rows, gated::Slots::active), scratch.mixed, prepared.up, true, y,
                     context);
}

template <class T>
void ModulatedBank<T>::modulate_backward(const Weights& weights, const Routing<T>& routing,
                                         RowsBy x_rows, MatView<const T> projected,
                                         MatView<const T> dhidden, MatView<T> dprojected,
                                         const Params<T>& grad) const {
  for (Index r = 0; r < dprojected.rows; ++r) std::ranges::fill(dprojected.row(r), T(0));
  for (Index t = 0; t < routing.tokens; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      if (routing.gate[s] == T(0)) continue;
      const Index row = x_rows == RowsBy::token ? t : s, e = routing.expert[s];
      for (Index i = 0; i < config_.rank; ++i) {
        const T d = dhidden(s, i);
        dprojected(row, i) = std::fma(d, weights.gamma(e, i), dprojected(row, i));
        if (grad.beta.data != nullptr) grad.beta(e, i) += d;
        if (grad.gamma.data == nullptr) continue;
        grad.gamma(e, i) = std::fma(d, projected(row, i), grad.gamma(e, i));
      }
    }
  }
}

template <class T>
void ModulatedBank<T>::backward(const Weights& weights, const Tape& saved,
                                const BankInput<T>& input, const Routing<T>& routing,
                                MatView<const T> dy, std::span<T> dgate,
                                const BankInputGradient<T>& d_input, const Params<T>& grad,
                                const Context& context) const {
  check_params(weights, false);
  check_params(grad, true);
  require_bank_call<T>(input, routing, dy, dgate, d_input, experts(), config_.in, config_.out);
  if (routing.slots() == 0) return;
  check_tape(saved, routing.slots(), input.x.rows);
  Workspace::Frame frame(context.scratch);
  const Scratch scratch =
      take_scratch(context.scratch, input.x.rows, dy.rows, routing.slots(), true);
  const SlotLists& lists = routing.lists;
  const std::span<const T> scale = config_.scale;
  const auto rows = [&](RowsBy by, gated::Slots which) {
    return gated::used_rows<T>(routing.token_begin, routing.gate, by, which, scratch.rows);
  };

  gated::multiply<T>(rows(input.y_rows, gated::Slots::all), dy, weights.up, false, scratch.v,
                     context);
  gated::gate_gradient<T>(lists, scale, rank_begin_, saved.hidden, scratch.v, input.y_rows, {}, dy,
                          input.y_rows, dgate, context);
  if (grad.up.data != nullptr) {
    gated::mix<T>(routing.token_begin, routing.expert, routing.gate, scale, saved.hidden,
                  scratch.mixed, input.y_rows, context);
    gated::outer<T>(rows(input.y_rows, gated::Slots::active), dy, scratch.mixed, grad.up, context);
  }
  gated::apply_gates<T>(lists, routing.gate, scale, rank_begin_, scratch.v, input.y_rows,
                        scratch.hidden, context);
  const MatView<T> dprojected = scratch.projected;
  modulate_backward(weights, routing, input.x_rows, saved.projected, scratch.hidden, dprojected,
                    grad);
  const gated::Rows used = rows(input.x_rows, gated::Slots::active);
  if (grad.down.data != nullptr) {
    gated::outer<T>(used, dprojected, input.x, grad.down, context);
  }
  if (d_input.x.data != nullptr) {
    gated::multiply<T>(used, dprojected, weights.down, true, d_input.x, context);
  }
}

#ifndef MOLE_HEADER_ONLY
extern template class ModulatedBank<float>;
extern template class ModulatedBank<double>;
#endif

static_assert(ExpertBank<ModulatedBank<float>>);

}  // namespace mole::inline MOLE_ABI

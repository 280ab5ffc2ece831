// SPDX-License-Identifier: Apache-2.0
// Low-rank experts with a magnitude (Liu et al., "DoRA", ICML 2024), mixed by gates. They act on
// the base product too, so they ask for it.
//
//   y_t += Σ_e gate_te ((u_e - 1) ∘ base_t + u_e ∘ (s_e B_e A_e x_t))      u_e = magnitude_e /
//   norm_e norm_eo = ‖(W + s_e B_e A_e)_o‖₂, a constant in backward; base = x Wᵀ
//
// x [tokens, in]   base [tokens, out]   A_e [r_e, in]   B_e [out, r_e]   magnitude, norm [experts,
// out]
//
// Rows of base belong to what rows of y belong to. The low-rank part is a LoraBank whose up
// matrices are diag(u_e) B_e.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "mole/experts/lora_bank.hpp"

namespace skeleton {

using mole::Index;
using mole::MatView;

/// `norm` is a constant of the weights, from DoraBank::norm after every change of them, so `visit`
/// does not name it.
template <class V>
struct DoraBankParams {
  mole::LoraBankParams<V> lora;
  MatView<V> magnitude;  ///< [experts, out]
  MatView<V> norm = {};  ///< [experts, out]; only of weights

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    mole::LoraBankParams<V>::visit(f, p.lora...);
    f(mole::Leaf{"magnitude"}, p.magnitude...);
  }
  operator DoraBankParams<const V>() const noexcept requires(!std::is_const_v<V>) {
    return {lora, magnitude, norm};
  }
};

template <class T>
class DoraBank {
 public:
  using Scalar = T;
  template <class V>
  using Params = DoraBankParams<V>;
  using Weights = Params<const T>;
  using Lora = mole::LoraBank<T>;
  using Config = typename Lora::Config;  ///< without bias

  struct Prepared {
    typename Lora::Prepared folded;
    MatView<const T> share;  ///< [experts, out], u
  };
  using Tape = typename Lora::Tape;

  static constexpr bool needs_base = true;

  explicit DoraBank(const Config& config) : config_(config), lora_(config) {}

  Index input_width() const noexcept { return config_.in; }
  Index output_width() const noexcept { return config_.out; }
  Index experts() const noexcept { return lora_.experts(); }

  /// Norms are 1.
  template <class V>
  Params<V> make_params(mole::Workspace& memory) const {
    const Params<V> params{lora_.template make_params<V>(memory),
                           memory.take<V>(experts(), config_.out),
                           memory.take<V>(experts(), config_.out)};
    std::fill_n(params.norm.data, params.norm.size(), V(1));
    return params;
  }
  template <class V>
  std::size_t params_bytes() const noexcept {
    mole::ByteCounter counter;
    counter.take<V>(experts(), config_.out);
    counter.take<V>(experts(), config_.out);
    return counter.bytes() + lora_.template params_bytes<V>();
  }

  /// Row norms of the merged weights; weight [out, in].
  void norm(MatView<const T> weight, const Weights& params, MatView<T> norm) const {
    for (Index e = 0; e < experts(); ++e) {
      const MatView<const T> down = params.lora.down_of(e), up = params.lora.up_of(e);
      for (Index o = 0; o < config_.out; ++o) {
        T sum = T(0);
        for (Index i = 0; i < config_.in; ++i) {
          T delta = T(0);
          for (Index r = 0; r < down.rows; ++r) delta = std::fma(up(o, r), down(r, i), delta);
          const T merged = std::fma(config_.scale[e], delta, weight(o, i));
          sum = std::fma(merged, merged, sum);
        }
        norm(e, o) = std::sqrt(sum);
      }
    }
  }

  std::size_t prepared_bytes() const noexcept {
    mole::ByteCounter counter;
    counter.take<T>(experts(), config_.out);
    take_folded(counter);
    return counter.bytes() + lora_.prepared_bytes();
  }
  std::size_t scratch_bytes(Index max_tokens, Index max_slots, int workers) const noexcept {
    mole::ByteCounter counter;
    counter.take<T>(experts(), config_.out);
    counter.take<T>(experts(), config_.out);
    take_folded(counter);
    take_folded(counter);
    return counter.bytes() + lora_.scratch_bytes(max_tokens, max_slots, workers);
  }
  std::size_t tape_bytes(Index max_tokens, Index max_slots) const noexcept {
    return lora_.tape_bytes(max_tokens, max_slots);
  }
  Tape make_tape(mole::Workspace& memory, Index max_tokens, Index max_slots) const {
    return lora_.make_tape(memory, max_tokens, max_slots);
  }

  Prepared prepare(const Weights& weights, mole::Workspace& memory) const {
    const MatView<T> share = take_share(weights, memory);
    const mole::LoraBankParams<T> folded = fold(weights.lora, share, memory);
    return {lora_.prepare(joined(weights.lora, folded), memory), share};
  }

  void forward(const Prepared& prepared, const mole::BankInput<T>& input,
               const mole::Routing<T>& routing, MatView<T> y, Tape* tape,
               const mole::Context& context) const {
    mole::require_shape("base", input.base, y.rows, config_.out);
    lora_.forward(prepared.folded, input, routing, y, tape, context);
    for (Index t = 0; t < routing.tokens; ++t) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        const T gate = routing.gate[s];
        const Index row = input.y_rows == mole::RowsBy::slot ? s : t;
        const std::span<const T> share = prepared.share.row(routing.expert[s]);
        for (Index n = 0; gate != T(0) && n < config_.out; ++n) {
          y(row, n) = std::fma(gate * (share[n] - T(1)), input.base(row, n), y(row, n));
        }
      }
    }
  }

  void backward(const Weights& weights, const Tape& saved, const mole::BankInput<T>& input,
                const mole::Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                const mole::BankInputGradient<T>& d_input, const Params<T>& grad,
                const mole::Context& context) const {
    mole::require_shape("base", input.base, dy.rows, config_.out);
    mole::Workspace& scratch = context.scratch;
    const mole::Workspace::Frame frame(scratch);
    const MatView<T> share = take_share(weights, scratch);
    const MatView<T> d_share = scratch.take<T>(experts(), config_.out);
    std::fill_n(d_share.data, d_share.size(), T(0));
    const mole::LoraBankParams<T> folded = fold(weights.lora, share, scratch);
    const mole::LoraBankParams<T> d_folded = take_folded(scratch);
    for (Index e = 0; e < experts(); ++e) {
      std::fill_n(d_folded.up_of(e).data, d_folded.up_of(e).size(), T(0));
    }
    mole::LoraBankParams<T> d_lora = d_folded;
    d_lora.down = grad.lora.down;
    d_lora.down_stride = grad.lora.down_stride;
    lora_.backward(joined(weights.lora, folded), saved, input, routing, dy, dgate, d_input, d_lora,
                   context);
    for (Index t = 0; t < routing.tokens; ++t) {
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        const Index row = input.y_rows == mole::RowsBy::slot ? s : t;
        base_backward(row, s, input.base, routing, dy, share, dgate, d_share, d_input.base);
      }
    }
    for (Index e = 0; e < experts(); ++e) {
      const bool idle =
          mole::gated::slots_of(routing.lists, e, mole::gated::Slots::active).size() == 0;
      if (!idle) unfold_gradient(e, weights, d_folded.up_of(e), share, d_share, grad);
    }
  }

 private:
  /// A parameter struct with up matrices only.
  template <class Arena>
  mole::LoraBankParams<T> take_folded(Arena& arena) const {
    const std::span<T*> list = arena.template take<T*>(experts());
    for (Index e = 0; e < experts(); ++e) {
      const std::span<T> block = arena.template take<T>(config_.out * config_.rank[e]);
      if (!list.empty()) list[e] = block.data();
    }
    mole::LoraBankParams<T> folded;
    folded.in = config_.in;
    folded.out = config_.out;
    folded.rank = config_.rank;
    folded.up = list;
    return folded;
  }
  /// The down matrices of one struct and the up matrices of another.
  static mole::LoraBankParams<const T> joined(const mole::LoraBankParams<const T>& down,
                                              const mole::LoraBankParams<const T>& up) {
    mole::LoraBankParams<const T> both = up;
    both.down = down.down;
    both.down_stride = down.down_stride;
    return both;
  }
  mole::LoraBankParams<T> fold(const mole::LoraBankParams<const T>& lora, MatView<const T> share,
                               mole::Workspace& memory) const {
    const mole::LoraBankParams<T> folded = take_folded(memory);
    for (Index e = 0; e < experts(); ++e) {
      const MatView<const T> from = lora.up_of(e);
      const MatView<T> to = folded.up_of(e);
      for (Index o = 0; o < from.rows; ++o) {
        for (Index r = 0; r < from.cols; ++r) to(o, r) = share(e, o) * from(o, r);
      }
    }
    return folded;
  }
  MatView<T> take_share(const Weights& weights, mole::Workspace& memory) const {
    mole::require_shape("magnitude", weights.magnitude, experts(), config_.out);
    mole::require_shape("norm", weights.norm, experts(), config_.out);
    const MatView<T> share = memory.take<T>(experts(), config_.out);
    for (Index e = 0; e < experts(); ++e) {
      for (Index o = 0; o < config_.out; ++o) {
        share(e, o) = weights.magnitude(e, o) / weights.norm(e, o);
      }
    }
    return share;
  }

  void base_backward(Index row, Index slot, MatView<const T> base, const mole::Routing<T>& routing,
                     MatView<const T> dy, MatView<const T> share, std::span<T> dgate,
                     MatView<T> d_share, MatView<T> d_base) const noexcept {
    const Index e = routing.expert[slot];
    const T gate = routing.gate[slot];
    for (Index n = 0; n < config_.out; ++n) {
      const T less = share(e, n) - T(1), d = dy(row, n);
      dgate[slot] = std::fma(d * less, base(row, n), dgate[slot]);
      if (gate == T(0)) continue;
      d_share(e, n) = std::fma(gate * d, base(row, n), d_share(e, n));
      if (d_base.data != nullptr) d_base(row, n) = std::fma(gate * less, d, d_base(row, n));
    }
  }

  /// From diag(u) B to u and B, and from u to the magnitude.
  void unfold_gradient(Index e, const Weights& weights, MatView<const T> d_folded,
                       MatView<const T> share, MatView<T> d_share,
                       const Params<T>& grad) const noexcept {
    const MatView<const T> up = weights.lora.up_of(e);
    for (Index o = 0; o < config_.out; ++o) {
      for (Index r = 0; r < up.cols; ++r) {
        d_share(e, o) = std::fma(d_folded(o, r), up(o, r), d_share(e, o));
        if (grad.lora.up.empty()) continue;
        T& sum = grad.lora.up_of(e)(o, r);
        sum = std::fma(share(e, o), d_folded(o, r), sum);
      }
      if (grad.magnitude.data != nullptr)
        grad.magnitude(e, o) += d_share(e, o) / weights.norm(e, o);
    }
  }

  Config config_;
  Lora lora_;
};

static_assert(mole::ExpertBank<DoraBank<float>>);
static_assert(mole::ExpertBank<DoraBank<double>>);

}  // namespace skeleton

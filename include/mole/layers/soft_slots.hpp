// SPDX-License-Identifier: Apache-2.0
// SoftSlots: the two soft assignments of Soft MoE. A slot is a mean of tokens, a token a mean of
// slots; the logits of both are the same. For each sequence on its own:
//
//   L = X Φᵀ      D = softmax of every column of L, over the tokens      slots  = Dᵀ X
//                 C = softmax of every row of L, over the slots          tokens = C (what came
//                 back)
//
// With `normalise` x̂ = x / √(Σ x² + epsilon) and φ̂ likewise: L = scale · X̂ Φ̂ᵀ, the scale learned.
//
// Shapes: X [tokens, width], Φ [slots, width], scale [1, 1], L, D, C [tokens, slots]. Padding (mask
// 0) and tokens whose logits are not all finite have no part: no slot sees them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/params.hpp"
#include "mole/kernels/chain_product.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/kernels/gated.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/stages.hpp"
#include "mole/routing/tokens.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct SoftSlotsParams {
  MatView<V> phi = {};    ///< [slots, width]
  MatView<V> scale = {};  ///< [1, 1], or empty: not normalised

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"phi"}, p.phi...);
    f(Leaf{"scale"}, p.scale...);
  }
  operator SoftSlotsParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {phi, scale};
  }
};

template <class T>
struct SoftSlots {
  Index width = 0, slots = 0;
  bool normalise = false;
  double epsilon = 1e-6;

  template <class V>
  using Params = SoftSlotsParams<V>;
  using Prepared = Panels<T>;  ///< Φ, or scale · Φ̂

  /// What `weigh` finds out. Tokens with a part are listed sequence by sequence; sequences without
  /// such a token are left out.
  struct Assignment {
    MatView<T> dispatch, combine;   ///< [tokens, slots], D and C; rows of listed tokens alone
    MatView<T> unit;                ///< [tokens, width], x̂, if normalised
    MatView<T> inverse;             ///< [1, tokens], x̂ over x, if normalised
    std::span<std::int32_t> token;  ///< [tokens], the list
    std::span<std::int32_t> begin;  ///< [sequences + 1], into the list
    Index tokens = 0, sequences = 0;

    std::span<const std::int32_t> listed() const noexcept {
      return token.first(static_cast<std::size_t>(begin[sequences]));
    }
    std::span<const std::int32_t> listed(Index sequence) const noexcept {
      return listed().subspan(static_cast<std::size_t>(begin[sequence]),
                              static_cast<std::size_t>(begin[sequence + 1] - begin[sequence]));
    }
  };

  template <class Arena>
  Params<T> take_params(Arena& arena) const {
    return {arena.template take<T>(slots, width),
            normalise ? arena.template take<T>(1, 1) : MatView<T>()};
  }
  template <class Arena>
  Assignment take_assignment(Arena& arena, Index tokens, Index sequences) const;
  /// Throws shape_mismatch, naming the member.
  void check(const Params<const T>& params) const;
  /// The same for gradients, any of which may be absent.
  void check_gradient(const Params<T>& grad) const;
  std::size_t prepared_bytes() const noexcept;
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;

  void weigh(const Prepared& prepared, const Tokens<T>& tokens, Assignment& found,
             const Context& context) const;

  /// Adds what arrives by D and C, given for the listed tokens. dx and the members of grad may be
  /// empty.
  void weigh_backward(const Params<const T>& params, const Assignment& found, MatView<const T> x,
                      MatView<const T> d_dispatch, MatView<const T> d_combine, MatView<T> dx,
                      const Params<T>& grad, const Context& context) const;

 private:
  /// unit = row · inverse; returns inverse = 1 / √(Σ row² + epsilon).
  T unit_row(std::span<const T> row, std::span<T> unit) const noexcept;
  /// drow += factor · (dunit - unit (unit · dunit)).
  static void unit_row_backward(std::span<const T> unit, std::span<const T> dunit, T factor,
                                std::span<T> drow) noexcept;
  void list_tokens(const Tokens<T>& tokens, MatView<const T> logits,
                   Assignment& found) const noexcept;
  void softmax_over_tokens(MatView<const T> logits, const Assignment& found,
                           const Context& context) const;
  void logit_gradient(const Assignment& found, MatView<const T> d_dispatch,
                      MatView<const T> d_combine, MatView<T> dlogits, const Context& context) const;
  void unit_backward(const Params<const T>& params, const Assignment& found,
                     MatView<const T> dlogits, MatView<T> dx, const Params<T>& grad,
                     const Context& context) const;
};

namespace soft {

/// to_s += Σ_t weight_ts from_t over the listed tokens, ascending.
template <class T>
void to_slots(std::span<const std::int32_t> listed, MatView<const T> weight, MatView<const T> from,
              MatView<T> to, const Context& context) noexcept {
  const auto depth = static_cast<Index>(listed.size());
  const auto columns = [&](Index first, Index count) {
    ChainProduct<T> p;
    p.rows = to.rows;
    p.depth = depth;
    p.cols = count;
    p.a = {weight, listed.data()};
    p.b = {from.col_block(first, count), listed.data()};
    p.c = to.col_block(first, count);
    p.a_by_depth = true;
    chain_product(p, context.isa);
  };
  gated::for_each_block(to.cols, kPanel, to.rows * depth, context, columns);
}

/// to_t += Σ_s weight_ts from_s for the listed tokens, s ascending.
template <class T>
void to_tokens(std::span<const std::int32_t> listed, MatView<const T> weight, MatView<const T> from,
               MatView<T> to, const Context& context) noexcept {
  const auto rows = [&](Index first, Index count) {
    ChainProduct<T> p;
    p.rows = count;
    p.depth = from.rows;
    p.cols = to.cols;
    p.a = {weight, listed.data() + first};
    p.b = from;
    p.c = {to, listed.data() + first};
    chain_product(p, context.isa);
  };
  gated::for_each_block(static_cast<Index>(listed.size()), gated::kSlotTile, from.rows * to.cols,
                        context, rows);
}

/// to_ts = token_t · slot_s for the listed tokens. Needs scratch for a copy of the slots.
template <class T>
void products(std::span<const std::int32_t> listed, MatView<const T> token, MatView<const T> slot,
              MatView<T> to, const Context& context) {
  const Workspace::Frame frame(context.scratch);
  const Panels<T> panels = rows::pack(slot, context.scratch);
  const auto rows = [&](Index first, Index count) {
    panel_product<T>({token, listed.data() + first}, count, panels, 0, panels.count(),
                     {to, listed.data() + first}, true, context.isa);
  };
  gated::for_each_block(static_cast<Index>(listed.size()), gated::kSlotTile, slot.size(), context,
                        rows);
}

}  // namespace soft

template <class T>
template <class Arena>
auto SoftSlots<T>::take_assignment(Arena& arena, Index tokens, Index sequences) const
    -> Assignment {
  Assignment found;
  found.dispatch = arena.template take<T>(tokens, slots);
  found.combine = arena.template take<T>(tokens, slots);
  if (normalise) {
    found.unit = arena.template take<T>(tokens, width);
    found.inverse = arena.template take<T>(1, tokens);
  }
  found.token = arena.template take<std::int32_t>(tokens);
  found.begin = arena.template take<std::int32_t>(sequences + 1);
  return found;
}

template <class T>
void SoftSlots<T>::check(const Params<const T>& params) const {
  require_shape("phi", params.phi, slots, width);
  require_shape("scale", params.scale, normalise ? 1 : 0, normalise ? 1 : 0);
}

template <class T>
void SoftSlots<T>::check_gradient(const Params<T>& grad) const {
  if (grad.phi.data != nullptr) require_shape("grad.phi", grad.phi, slots, width);
  if (grad.scale.data == nullptr) return;
  require_shape("grad.scale", grad.scale, normalise ? 1 : 0, normalise ? 1 : 0);
}

template <class T>
std::size_t SoftSlots<T>::prepared_bytes() const noexcept {
  ByteCounter counter;
  counter.take<T>(slots, width);
  if (normalise) counter.take<T>(slots, width);
  return counter.bytes();
}

template <class T>
auto SoftSlots<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  check(params);
  if (!normalise) return rows::pack(params.phi, memory);
  const MatView<T> scaled = memory.take<T>(slots, width);
  for (Index s = 0; s < slots; ++s) {
    unit_row(params.phi.row(s), scaled.row(s));
    for (T& value : scaled.row(s)) value *= params.scale(0, 0);
  }
  return rows::pack(MatView<const T>(scaled), memory);
}

template <class T>
std::size_t SoftSlots<T>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  ByteCounter counter;
  WorkerRows<T>(counter, workers, 3, max_tokens);
  counter.take<T>(max_tokens, slots);
  if (normalise) {
    counter.take<T>(max_tokens, width);
    counter.take<T>(slots, width);
    counter.take<T>(slots, width);
  }
  return counter.bytes();
}

template <class T>
T SoftSlots<T>::unit_row(std::span<const T> row, std::span<T> unit) const noexcept {
  double sum = epsilon;
  for (const T value : row) {
    const auto v = static_cast<double>(value);
    sum = std::fma(v, v, sum);
  }
  const T inverse = static_cast<T>(1 / std::sqrt(sum));
  for (std::size_t i = 0; i < row.size(); ++i) unit[i] = row[i] * inverse;
  return inverse;
}

template <class T>
void SoftSlots<T>::unit_row_backward(std::span<const T> unit, std::span<const T> dunit, T factor,
                                     std::span<T> drow) noexcept {
  T along = T(0);
  for (std::size_t i = 0; i < unit.size(); ++i) along = std::fma(unit[i], dunit[i], along);
  for (std::size_t i = 0; i < unit.size(); ++i) {
    drow[i] = std::fma(factor, std::fma(-along, unit[i], dunit[i]), drow[i]);
  }
}

template <class T>
void SoftSlots<T>::list_tokens(const Tokens<T>& tokens, MatView<const T> logits,
                               Assignment& found) const noexcept {
  std::int32_t listed = 0;
  found.tokens = tokens.count();
  found.sequences = 0;
  found.begin[0] = 0;
  for_each_sequence(tokens, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const bool is_real = tokens.mask.empty() || tokens.mask[t] != 0;
      if (!is_real || !stages::is_finite<T>(logits.row(t))) continue;
      found.token[listed++] = static_cast<std::int32_t>(t);
    }
    if (listed > found.begin[found.sequences]) found.begin[++found.sequences] = listed;
  });
}

template <class T>
void SoftSlots<T>::softmax_over_tokens(MatView<const T> logits, const Assignment& found,
                                       const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const WorkerRows<T> columns(context.scratch, context.workers, 1, found.tokens);
  for (Index q = 0; q < found.sequences; ++q) {
    const std::span<const std::int32_t> listed = found.listed(q);
    const Index grain = gated::grain_for(static_cast<Index>(listed.size()));
    parallel_for(context, slots, grain, [&](Index first, Index last, int worker) {
      const std::span<T> column = columns(worker, 0).first(listed.size());
      for (Index s = first; s < last; ++s) {
        for (std::size_t i = 0; i < listed.size(); ++i) column[i] = logits(listed[i], s);
        stages::softmax<T>(column, column);
        for (std::size_t i = 0; i < listed.size(); ++i) found.dispatch(listed[i], s) = column[i];
      }
    });
  }
}

template <class T>
void SoftSlots<T>::weigh(const Prepared& prepared, const Tokens<T>& tokens, Assignment& found,
                         const Context& context) const {
  const Index count = tokens.count();
  MatView<const T> x = tokens.x;
  if (normalise) {
    parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int) {
      for (Index t = begin; t < end; ++t) {
        found.inverse(0, t) = unit_row(tokens.x.row(t), found.unit.row(t));
      }
    });
    x = found.unit.row_block(0, count);
  }
  const MatView<T> logits = found.combine.row_block(0, count);
  dense::forward<T>(prepared, {}, x, logits, context);
  list_tokens(tokens, logits, found);
  softmax_over_tokens(logits, found, context);
  const std::span<const std::int32_t> listed = found.listed();
  const auto combine = [&](Index begin, Index end, int) {
    for (Index i = begin; i < end; ++i) {
      stages::softmax<T>(logits.row(listed[i]), found.combine.row(listed[i]));
    }
  };
  parallel_for(context, static_cast<Index>(listed.size()), kTokensPerTask, combine);
}

template <class T>
void SoftSlots<T>::logit_gradient(const Assignment& found, MatView<const T> d_dispatch,
                                  MatView<const T> d_combine, MatView<T> dlogits,
                                  const Context& context) const {
  const std::span<const std::int32_t> all = found.listed();
  const auto by_combine = [&](Index begin, Index end, int) {
    for (Index i = begin; i < end; ++i) {
      const Index t = all[i];
      std::ranges::fill(dlogits.row(t), T(0));
      stages::softmax_backward<T>(found.combine.row(t), d_combine.row(t), dlogits.row(t));
    }
  };
  parallel_for(context, static_cast<Index>(all.size()), kTokensPerTask, by_combine);
  const Workspace::Frame frame(context.scratch);
  const WorkerRows<T> columns(context.scratch, context.workers, 3, found.tokens);
  for (Index q = 0; q < found.sequences; ++q) {
    const std::span<const std::int32_t> listed = found.listed(q);
    const std::size_t count = listed.size();
    const auto by_dispatch = [&](Index first, Index last, int worker) {
      const auto share = columns(worker, 0).first(count), d_share = columns(worker, 1).first(count);
      const auto d_column = columns(worker, 2).first(count);
      for (Index s = first; s < last; ++s) {
        for (std::size_t i = 0; i < count; ++i) {
          share[i] = found.dispatch(listed[i], s);
          d_share[i] = d_dispatch(listed[i], s);
          d_column[i] = dlogits(listed[i], s);
        }
        stages::softmax_backward<T>(share, d_share, d_column);
        for (std::size_t i = 0; i < count; ++i) dlogits(listed[i], s) = d_column[i];
      }
    };
    parallel_for(context, slots, gated::grain_for(static_cast<Index>(count)), by_dispatch);
  }
}

template <class T>
void SoftSlots<T>::unit_backward(const Params<const T>& params, const Assignment& found,
                                 MatView<const T> dlogits, MatView<T> dx, const Params<T>& grad,
                                 const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const std::span<const std::int32_t> listed = found.listed();
  const T scale = params.scale(0, 0);
  const MatView<T> unit = context.scratch.take<T>(slots, width);
  const MatView<T> dunit = context.scratch.take<T>(slots, width);
  if (dx.data != nullptr) {
    const MatView<T> dx_unit = context.scratch.take<T>(found.tokens, width);
    for (Index s = 0; s < slots; ++s) unit_row(params.phi.row(s), unit.row(s));
    for (const std::int32_t t : listed) std::ranges::fill(dx_unit.row(t), T(0));
    soft::to_tokens<T>(listed, dlogits, unit, dx_unit, context);
    for (const std::int32_t t : listed) {
      unit_row_backward(found.unit.row(t), dx_unit.row(t), scale * found.inverse(0, t), dx.row(t));
    }
  }
  if (grad.phi.data == nullptr && grad.scale.data == nullptr) return;
  rows::fill(dunit, 0);
  soft::to_slots<T>(listed, dlogits, found.unit, dunit, context);
  T dscale = T(0);
  for (Index s = 0; s < slots; ++s) {
    const T inverse = unit_row(params.phi.row(s), unit.row(s));
    for (Index i = 0; i < width; ++i) dscale = std::fma(unit(s, i), dunit(s, i), dscale);
    if (grad.phi.data == nullptr) continue;
    unit_row_backward(unit.row(s), dunit.row(s), scale * inverse, grad.phi.row(s));
  }
  if (grad.scale.data != nullptr) grad.scale(0, 0) += dscale;
}

template <class T>
void SoftSlots<T>::weigh_backward(const Params<const T>& params, const Assignment& found,
                                  MatView<const T> x, MatView<const T> d_dispatch,
                                  MatView<const T> d_combine, MatView<T> dx, const Params<T>& grad,
                                  const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const MatView<T> dlogits = context.scratch.take<T>(found.tokens, slots);
  logit_gradient(found, d_dispatch, d_combine, dlogits, context);
  if (normalise) return unit_backward(params, found, dlogits, dx, grad, context);
  const std::span<const std::int32_t> listed = found.listed();
  if (dx.data != nullptr) soft::to_tokens<T>(listed, dlogits, params.phi, dx, context);
  if (grad.phi.data != nullptr) soft::to_slots<T>(listed, dlogits, x, grad.phi, context);
}

#ifndef MOLE_HEADER_ONLY
extern template struct SoftSlots<float>;
extern template struct SoftSlots<double>;
#endif

}  // namespace mole::inline MOLE_ABI

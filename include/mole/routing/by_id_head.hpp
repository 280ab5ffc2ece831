// SPDX-License-Identifier: Apache-2.0
// ByIdHead: several linear heads; the id of a token says which is its own (text and image, tasks,
// languages).
//
//   l_t = x_t W_hᵀ + b_h       h = id of the token mod heads; without ids head 0 for all
//
//   x [tokens, width]   W [heads * experts, width], one above the other   b [1, heads * experts]
//
// A token whose id is negative has no available expert: its logits are -inf.
#pragma once

#include <algorithm>
#include <limits>
#include <span>

#include "mole/core/config.hpp"
#include "mole/routing/head.hpp"

namespace mole::inline MOLE_ABI {

/// The linear map is that of all heads, one below the other.
template <class T>
struct ByIdHead : LinearHead<T> {
  Index count = 0;  ///< of experts
  Index heads = 1;

  Index experts() const noexcept { return count; }
  std::size_t scratch_bytes(Index max_tokens, int) const noexcept {
    ByteCounter counter;
    counter.take<T>(max_tokens, this->linear.experts);
    return counter.bytes() + stages::project_backward_bytes(this->linear.experts);
  }

  void forward(const LinearPrepared<T>& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T>, None, NoHeadTape, const Context& context) const;
  void backward(const LinearParams<const T>& params, NoHeadTape, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T>, None, MatView<T> dx,
                const LinearParams<T>& grad, None, const Context& context) const;

 private:
  /// The columns of a token among those of all heads; empty for a negative id.
  template <class V>
  std::span<V> columns(MatView<V> all, const Tokens<T>& tokens, Index t) const noexcept {
    const Index id = tokens.ids.empty() ? 0 : Index{tokens.ids[t]};
    if (id < 0) return {};
    return all.row(t).subspan(static_cast<std::size_t>(id % heads * count),
                              static_cast<std::size_t>(count));
  }
};

/// Throws invalid_argument, naming the field.
template <class T>
ByIdHead<T> by_id_head(const char* router, Index width, Index experts, Index heads, bool bias) {
  linear_head<T>(router, width, experts, bias);
  require_count(router, "heads", heads);
  return {{{width, saturating_product(heads, experts), bias}}, experts, heads};
}

template <class T>
void ByIdHead<T>::forward(const LinearPrepared<T>& prepared, const Tokens<T>& tokens, None,
                          MatView<T> logits, MatView<T>, None, NoHeadTape,
                          const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const MatView<T> all = context.scratch.template take<T>(logits.rows, this->linear.experts);
  stages::project<T>(prepared, tokens.x, all, context);
  for (Index t = 0; t < logits.rows; ++t) {
    const std::span<const T> own = columns<T>(all, tokens, t);
    if (own.empty()) {
      std::ranges::fill(logits.row(t), -std::numeric_limits<T>::infinity());
    } else {
      std::ranges::copy(own, logits.row(t).begin());
    }
  }
}

template <class T>
void ByIdHead<T>::backward(const LinearParams<const T>& params, NoHeadTape, const Tokens<T>& tokens,
                           None, MatView<const T> dlogits, MatView<const T>, None, MatView<T> dx,
                           const LinearParams<T>& grad, None, const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const MatView<T> all = context.scratch.template take<T>(dlogits.rows, this->linear.experts);
  std::fill_n(all.data, all.size(), T(0));
  for (Index t = 0; t < dlogits.rows; ++t) {
    const std::span<T> own = columns<T>(all, tokens, t);
    if (!own.empty()) std::ranges::copy(dlogits.row(t), own.begin());
  }
  stages::project_backward<T>(params, tokens.x, all, dx, grad, context);
}

}  // namespace mole::inline MOLE_ABI

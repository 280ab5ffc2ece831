// SPDX-License-Identifier: Apache-2.0
// Stage `project`: the logits of a linear router.
//
//   logits [tokens, experts] = x [tokens, width] · weightᵀ [width, experts] + bias [1, experts]
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/routing/linear.hpp"

namespace mole::inline MOLE_ABI::stages {

/// logits = x weightᵀ + bias: one chain over the width from 0, then the bias.
template <class T>
void project(const LinearPrepared<T>& head, MatView<const T> x, MatView<T> logits,
             const Context& context);

/// dx += dlogits · weight, dweight += dlogitsᵀ · x, dbias += Σ_t dlogits, each where it has memory;
/// sums over tokens ascend. A token or an expert without any gradient is left out where its x or
/// its weight is not finite: 0 times that would spread NaN. Needs project_backward_bytes of
/// scratch.
template <class T>
void project_backward(const LinearParams<const T>& params, MatView<const T> x,
                      MatView<const T> dlogits, MatView<T> dx, const LinearParams<T>& grad,
                      const Context& context);

inline std::size_t project_backward_bytes(Index experts) noexcept {
  ByteCounter counter;
  counter.take<std::uint8_t>(experts);
  return counter.bytes();
}

template <class T>
void project(const LinearPrepared<T>& head, MatView<const T> x, MatView<T> logits,
             const Context& context) {
  if (!logits.empty()) dense::forward<T>(head.weight, as_row(head.bias), x, logits, context);
}

/// body(first, count) for every run of indices below `count` without `skip`.
template <class Skip, class Body>
void for_each_run(Index count, Skip skip, Body body) {
  for (Index first = 0; first < count;) {
    Index last = first;
    while (last < count && !skip(last)) ++last;
    if (last > first) body(first, last - first);
    first = last + 1;
  }
}

template <class T>
bool is_finite(std::span<const T> row) noexcept {
  return std::all_of(row.begin(), row.end(), [](T value) { return std::isfinite(value); });
}

template <class T>
bool is_zero(std::span<const T> row) noexcept {
  return std::all_of(row.begin(), row.end(), [](T value) { return value == T(0); });
}

template <class T>
void project_backward(const LinearParams<const T>& params, MatView<const T> x,
                      MatView<const T> dlogits, MatView<T> dx, const LinearParams<T>& grad,
                      const Context& context) {
  if (dlogits.empty()) return;
  const Workspace::Frame frame(context.scratch);
  if (dx.data != nullptr) {
    const auto used = context.scratch.template take<std::uint8_t>(dlogits.cols);
    std::fill(used.begin(), used.end(), std::uint8_t{0});
    for (Index t = 0; t < dlogits.rows; ++t) {
      for (Index e = 0; e < dlogits.cols; ++e) used[e] |= dlogits(t, e) != T(0);
    }
    for_each_run(
        dlogits.cols, [&](Index e) { return !used[e] && !is_finite<T>(params.weight.row(e)); },
        [&](Index first, Index count) {
          dense::input_gradient<T>(params.weight.row_block(first, count),
                                   dlogits.col_block(first, count), dx, context);
        });
  }
  if (grad.weight.data != nullptr) {
    for_each_run(
        dlogits.rows,
        [&](Index t) { return is_zero<T>(dlogits.row(t)) && !is_finite<T>(x.row(t)); },
        [&](Index first, Index count) {
          dense::weight_gradient<T>(x.row_block(first, count), dlogits.row_block(first, count),
                                    grad.weight, context);
        });
  }
  if (grad.bias.data != nullptr) dense::bias_gradient<T>(dlogits, grad.bias);
}

#ifndef MOLE_HEADER_ONLY
extern template void project(const LinearPrepared<float>&, MatView<const float>, MatView<float>,
                             const Context&);
extern template void project(const LinearPrepared<double>&, MatView<const double>, MatView<double>,
                             const Context&);
extern template void project_backward(const LinearParams<const float>&, MatView<const float>,
                                      MatView<const float>, MatView<float>,
                                      const LinearParams<float>&, const Context&);
extern template void project_backward(const LinearParams<const double>&, MatView<const double>,
                                      MatView<const double>, MatView<double>,
                                      const LinearParams<double>&, const Context&);
#endif

}  // namespace mole::inline MOLE_ABI::stages

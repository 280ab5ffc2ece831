// SPDX-License-Identifier: Apache-2.0
// Stage `pool`: one row for each sequence, for routers that decide by sequence.
//
//   mean   of the real tokens            last   the last real token
//
// Without a mask every token is real. A sequence with tokens but no real one has a row of zeros; a
// sequence without tokens has no row, so there are never more rows than tokens.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/view.hpp"
#include "mole/routing/tokens.hpp"

namespace mole::inline MOLE_ABI {

enum class Pool { mean, last };
constexpr std::array<std::string_view, 2> enum_names(Pool) noexcept {
  return {"mean", "last"};
}

namespace stages {

/// Fills the first rows of `pooled` [tokens or fewer, width]; how many.
template <class T>
Index pool(Pool how, const Tokens<T>& tokens, MatView<T> pooled) noexcept;

/// dx += what arrives by pool.
template <class T>
void pool_backward(Pool how, const Tokens<T>& tokens, MatView<const T> dpooled,
                   MatView<T> dx) noexcept;

/// Every token gets the row of its sequence.
template <class T>
void spread(const Tokens<T>& tokens, MatView<const T> of_sequence, MatView<T> of_token) noexcept;

/// of_sequence = the sums of its tokens' rows.
template <class T>
void spread_backward(const Tokens<T>& tokens, MatView<const T> of_token,
                     MatView<T> of_sequence) noexcept;

/// body(row, begin, end) for the sequences with tokens; `row` counts them.
template <class T, class Body>
Index for_each_filled(const Tokens<T>& tokens, Body body) {
  Index row = 0;
  for_each_sequence(tokens, [&](Index begin, Index end) {
    if (end > begin) body(row++, begin, end);
  });
  return row;
}

namespace detail {

/// body(t) for the tokens that the pooled row is the mean of; how many.
template <class T, class Body>
Index for_each_pooled(Pool how, const Tokens<T>& tokens, Index begin, Index end, Body body) {
  const auto real = [&](Index t) { return tokens.mask.empty() || tokens.mask[t] != 0; };
  Index count = 0;
  if (how == Pool::last) {
    while (end > begin && !real(end - 1)) --end;
    if (end > begin) body(end - 1), ++count;
    return count;
  }
  for (Index t = begin; t < end; ++t) {
    if (real(t)) body(t), ++count;
  }
  return count;
}

}  // namespace detail

template <class T>
Index pool(Pool how, const Tokens<T>& tokens, MatView<T> pooled) noexcept {
  return for_each_filled(tokens, [&](Index row, Index begin, Index end) {
    for (Index i = 0; i < pooled.cols; ++i) {
      double sum = 0;
      const Index count =
          detail::for_each_pooled(how, tokens, begin, end, [&](Index t) { sum += tokens.x(t, i); });
      pooled(row, i) = count > 0 ? static_cast<T>(sum / static_cast<double>(count)) : T(0);
    }
  });
}

template <class T>
void pool_backward(Pool how, const Tokens<T>& tokens, MatView<const T> dpooled,
                   MatView<T> dx) noexcept {
  for_each_filled(tokens, [&](Index row, Index begin, Index end) {
    const Index count = detail::for_each_pooled(how, tokens, begin, end, [](Index) {});
    const T share = T(1) / static_cast<T>(std::max<Index>(count, 1));
    detail::for_each_pooled(how, tokens, begin, end, [&](Index t) {
      for (Index i = 0; i < dx.cols; ++i) dx(t, i) = std::fma(share, dpooled(row, i), dx(t, i));
    });
  });
}

template <class T>
void spread(const Tokens<T>& tokens, MatView<const T> of_sequence, MatView<T> of_token) noexcept {
  for_each_filled(tokens, [&](Index row, Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      std::copy_n(of_sequence.row(row).begin(), of_token.cols, of_token.row(t).begin());
    }
  });
}

template <class T>
void spread_backward(const Tokens<T>& tokens, MatView<const T> of_token,
                     MatView<T> of_sequence) noexcept {
  for_each_filled(tokens, [&](Index row, Index begin, Index end) {
    for (Index i = 0; i < of_token.cols; ++i) {
      double sum = 0;
      for (Index t = begin; t < end; ++t) sum += of_token(t, i);
      of_sequence(row, i) = static_cast<T>(sum);
    }
  });
}

#ifndef MOLE_HEADER_ONLY
extern template Index pool(Pool, const Tokens<float>&, MatView<float>) noexcept;
extern template Index pool(Pool, const Tokens<double>&, MatView<double>) noexcept;
extern template void pool_backward(Pool, const Tokens<float>&, MatView<const float>,
                                   MatView<float>) noexcept;
extern template void pool_backward(Pool, const Tokens<double>&, MatView<const double>,
                                   MatView<double>) noexcept;
extern template void spread(const Tokens<float>&, MatView<const float>, MatView<float>) noexcept;
extern template void spread(const Tokens<double>&, MatView<const double>, MatView<double>) noexcept;
extern template void spread_backward(const Tokens<float>&, MatView<const float>,
                                     MatView<float>) noexcept;
extern template void spread_backward(const Tokens<double>&, MatView<const double>,
                                     MatView<double>) noexcept;
#endif

}  // namespace stages
}  // namespace mole::inline MOLE_ABI

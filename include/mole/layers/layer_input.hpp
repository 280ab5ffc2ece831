// SPDX-License-Identifier: Apache-2.0
// What a layer reads in one call, and where the gradients of it go.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/random.hpp"
#include "mole/core/view.hpp"
#include "mole/routing/tokens.hpp"

namespace mole::inline MOLE_ABI {

/// Only `x` is needed; a matrix converts to a LayerInput by itself.
template <class T>
struct LayerInput {
  MatView<const T> x;              ///< [tokens, in], what the experts read
  MatView<const T> router_x = {};  ///< [tokens, router width], what the router reads; empty: x
  MatView<const T> base = {};     ///< [tokens, out], x Wᵀ; for a bank that needs the base product
  MatView<const T> dropout = {};  ///< [tokens, in], factor on x for the experts; empty: none
  std::span<const std::int32_t> sequence_begin = {};  ///< see Tokens
  std::span<const std::int32_t> ids = {};             ///< see Tokens
  std::span<const std::uint8_t> mask = {};            ///< see Tokens
  Overrides<T> overrides = {};

  LayerInput() = default;
  template <class M>
  requires std::convertible_to<M&&, MatView<const T>> LayerInput(M&& tokens)
      : x(tokens) {}  // NOLINT(google-explicit-constructor)

  Tokens<T> tokens() const noexcept {
    return {router_x.data != nullptr ? router_x : x, sequence_begin, ids, mask};
  }
};

/// Members left empty are not computed. With an empty `router_x` the router's part is added to x.
template <class T>
struct LayerInputGradient {
  MatView<T> x = {};
  MatView<T> router_x = {};
  MatView<T> base = {};
};

/// Fills a dropout factor: 0 with probability p, else 1 / (1 - p); element (t, i) is number
/// t * cols + i of the stream. Throws invalid_argument unless 0 <= p < 1.
template <class T>
void fill_dropout(double p, const Random& random, MatView<T> factor) {
  require(p >= 0 && p < 1, Errc::invalid_argument, "dropout: p must be in [0, 1), got ", p);
  const T keep = static_cast<T>(1 / (1 - p));
  for (Index t = 0; t < factor.rows; ++t) {
    for (Index i = 0; i < factor.cols; ++i) {
      const auto n = static_cast<std::uint64_t>(t * factor.cols + i);
      factor(t, i) = random.uniform(n) < p ? T(0) : keep;
    }
  }
}

}  // namespace mole::inline MOLE_ABI

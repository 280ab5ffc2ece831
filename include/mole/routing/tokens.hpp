// SPDX-License-Identifier: Apache-2.0
// What a router reads (Tokens) and what a caller may force on it for one call (Overrides).
#pragma once

#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// Tokens of one call. `x` [tokens, width] is whatever the router routes by: the layer's input, a
/// hidden state, `X Aᵀ` of a rank-wise layer. The other members are for routers that need them.
template <class T>
struct Tokens {
  MatView<const T> x;
  std::span<const std::int32_t> sequence_begin = {};  ///< [sequences + 1]; empty: one sequence
  std::span<const std::int32_t> ids = {};             ///< [tokens], token, task or domain ids
  std::span<const std::uint8_t> mask = {};            ///< [tokens], 1 = real token; empty: all real

  Index count() const noexcept { return x.rows; }
};

/// Overrides of one call. Empty members do nothing. [1, experts] stands for every token.
template <class T>
struct Overrides {
  MatView<const T> logit_bias = {};            ///< [tokens or 1, experts], added to the logits
  MatView<const std::uint8_t> forbidden = {};  ///< [tokens or 1, experts], 1 = not available
  std::span<const std::int32_t> forced = {};   ///< [tokens], the only expert allowed; -1 = free
  MatView<const T> gates = {};                 ///< [tokens, experts], given gates (GivenRouter)
};

/// Throws shape_mismatch or invalid_argument unless the overrides fit [tokens, experts].
template <class T>
void check_overrides(const Overrides<T>& overrides, Index tokens, Index experts) {
  const auto rows = [&](const auto& view) { return view.rows == 1 ? 1 : tokens; };
  if (overrides.logit_bias.data != nullptr) {
    require_shape("overrides.logit_bias", overrides.logit_bias, rows(overrides.logit_bias),
                  experts);
  }
  if (overrides.forbidden.data != nullptr) {
    require_shape("overrides.forbidden", overrides.forbidden, rows(overrides.forbidden), experts);
  }
  if (overrides.gates.data != nullptr) {
    require_shape("overrides.gates", overrides.gates, tokens, experts);
  }
  require(overrides.forced.empty() || static_cast<Index>(overrides.forced.size()) == tokens,
          Errc::shape_mismatch, "overrides.forced: expected ", tokens, " experts, got ",
          overrides.forced.size());
  for (const std::int32_t expert : overrides.forced) {
    require(expert >= -1 && expert < experts, Errc::invalid_argument, "overrides.forced: expert ",
            expert, " is not in -1 ... ", experts - 1);
  }
}

}  // namespace mole::inline MOLE_ABI

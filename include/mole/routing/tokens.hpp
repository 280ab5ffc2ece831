// SPDX-License-Identifier: Apache-2.0
// What a router reads (Tokens) and what a caller may force on it for one call (Overrides).
#pragma once

#include <algorithm>
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

/// Throws shape_mismatch or invalid_argument unless the members that are there fit the tokens.
template <class T>
void check_tokens(const Tokens<T>& tokens) {
  const Index count = tokens.count();
  const auto fits = [count](const char* name, auto values) {
    require(values.empty() || static_cast<Index>(values.size()) == count, Errc::shape_mismatch,
            name, ": expected ", count, " values, got ", values.size());
  };
  fits("tokens.ids", tokens.ids);
  fits("tokens.mask", tokens.mask);
  const auto begin = tokens.sequence_begin;
  if (begin.empty()) return;
  require(begin.front() == 0 && begin.back() == count && std::is_sorted(begin.begin(), begin.end()),
          Errc::invalid_argument, "tokens.sequence_begin: expected to ascend from 0 to ", count);
}

/// body(begin, end) for the tokens of every sequence; without sequences all tokens are one.
template <class T, class Body>
void for_each_sequence(const Tokens<T>& tokens, Body body) {
  const auto begin = tokens.sequence_begin;
  if (begin.empty()) return body(Index{0}, tokens.count());
  for (std::size_t s = 0; s + 1 < begin.size(); ++s) body(Index{begin[s]}, Index{begin[s + 1]});
}

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

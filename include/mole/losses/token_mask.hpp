// SPDX-License-Identifier: Apache-2.0
// Which tokens a loss looks at.
#pragma once

#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// 1 = real token; empty: all are real.
struct TokenMask {
  std::span<const std::uint8_t> values = {};

  bool is_real(Index t) const noexcept {
    return values.empty() || values[static_cast<std::size_t>(t)] != 0;
  }
  double count(Index tokens) const noexcept {
    double real = 0;
    for (Index t = 0; t < tokens; ++t) real += is_real(t);
    return real;
  }
  /// Throws shape_mismatch.
  void check(Index tokens) const {
    require(values.empty() || static_cast<Index>(values.size()) == tokens, Errc::shape_mismatch,
            "mask: expected ", tokens, " values, got ", values.size());
  }
};

/// Throws shape_mismatch unless the gradient is absent or has the shape of the value.
template <class T, class V>
void check_gradient(const char* name, MatView<V> value, MatView<T> gradient) {
  if (gradient.data != nullptr) require_shape(name, gradient, value.rows, value.cols);
}

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// Sums of products in losses: fused and rounded once, so that no compiler decides about bits.
#pragma once

#include <cmath>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {

/// sum += a b, in double.
template <class T>
void add_product(T& sum, double a, double b) noexcept {
  sum = static_cast<T>(std::fma(a, b, static_cast<double>(sum)));
}

}  // namespace mole::inline MOLE_ABI

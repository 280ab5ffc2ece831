// SPDX-License-Identifier: Apache-2.0
// What constructors ask of the fields of a router's config. Each throws invalid_argument, naming
// the router, the field, what was expected and what came.
#pragma once

#include <cmath>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {

inline void require_field(bool good, const char* router, const char* field, const char* expected,
                          auto got) {
  require(good, Errc::invalid_argument, router, ": ", field, ": expected ", expected, ", got ",
          got);
}

inline void require_count(const char* router, const char* field, Index value) {
  require_field(value >= 1, router, field, "at least 1", value);
}
/// k experts a token.
inline void require_k(const char* router, Index k, Index experts) {
  require_field(k >= 1 && k <= experts, router, "k", "1 ... experts", k);
}

template <class T>
void require_finite(const char* router, const char* field, T value) {
  require_field(std::isfinite(value), router, field, "a finite number", value);
}
template <class T>
void require_from_zero(const char* router, const char* field, T value) {
  require_field(value >= T(0) && std::isfinite(value), router, field, "a number from 0 up", value);
}
template <class T>
void require_positive(const char* router, const char* field, T value) {
  require_field(value > T(0) && std::isfinite(value), router, field, "a positive number", value);
}

}  // namespace mole::inline MOLE_ABI

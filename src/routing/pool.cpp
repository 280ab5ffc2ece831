// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/pool.hpp"

namespace mole::inline MOLE_ABI::stages {

#define MOLE_POOL(T)                                                                          \
  template Index pool(Pool, const Tokens<T>&, MatView<T>) noexcept;                           \
  template void pool_backward(Pool, const Tokens<T>&, MatView<const T>, MatView<T>) noexcept; \
  template void spread(const Tokens<T>&, MatView<const T>, MatView<T>) noexcept;              \
  template void spread_backward(const Tokens<T>&, MatView<const T>, MatView<T>) noexcept;

MOLE_POOL(float)
MOLE_POOL(double)
#undef MOLE_POOL

}  // namespace mole::inline MOLE_ABI::stages

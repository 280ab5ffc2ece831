// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/activation_loops.hpp"

namespace mole::inline MOLE_ABI::gated {

#define MOLE_ACTIVATIONS(T)                                                                   \
  template void activate<T>(Activation, Rows, MatView<const T>, MatView<const T>, MatView<T>, \
                            const Context&) noexcept;                                         \
  template void activate_backward<T>(Activation, Rows, MatView<const T>, MatView<const T>,    \
                                     MatView<const T>, MatView<T>, MatView<T>,                \
                                     const Context&) noexcept;

MOLE_ACTIVATIONS(float)
MOLE_ACTIVATIONS(double)
#undef MOLE_ACTIVATIONS

}  // namespace mole::inline MOLE_ABI::gated

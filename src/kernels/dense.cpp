// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/dense_loops.hpp"

namespace mole::inline MOLE_ABI::dense {

#define MOLE_DENSE_LOOPS(T)                                                                  \
  template void forward<T>(const Panels<T>&, MatView<const T>, MatView<const T>, MatView<T>, \
                           const Context&) noexcept;                                         \
  template void input_gradient<T>(MatView<const T>, MatView<const T>, MatView<T>,            \
                                  const Context&) noexcept;                                  \
  template void weight_gradient<T>(MatView<const T>, MatView<const T>, MatView<T>,           \
                                   const Context&) noexcept;                                 \
  template void bias_gradient<T>(MatView<const T>, MatView<T>) noexcept;

MOLE_DENSE_LOOPS(float)
MOLE_DENSE_LOOPS(double)
#undef MOLE_DENSE_LOOPS

}  // namespace mole::inline MOLE_ABI::dense

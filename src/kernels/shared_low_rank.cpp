// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/shared_low_rank_loops.hpp"

namespace mole::inline MOLE_ABI::gated {

#define MOLE_SHARED_LOOPS(T)                                                                   \
  template Rows used_rows<T>(std::span<const std::int32_t>, std::span<const T>, RowsBy, Slots, \
                             std::span<std::int32_t>) noexcept;                                \
  template void mix<T>(std::span<const std::int32_t>, std::span<const std::int32_t>,           \
                       std::span<const T>, std::span<const T>, MatView<const T>, MatView<T>,   \
                       RowsBy, const Context&) noexcept;                                       \
  template void multiply<T>(Rows, MatView<const T>, const Panels<T>&, bool, MatView<T>,        \
                            const Context&) noexcept;                                          \
  template void multiply<T>(Rows, MatView<const T>, MatView<const T>, bool, MatView<T>,        \
                            const Context&) noexcept;                                          \
  template void outer<T>(Rows, MatView<const T>, MatView<const T>, MatView<T>,                 \
                         const Context&) noexcept;

MOLE_SHARED_LOOPS(float)
MOLE_SHARED_LOOPS(double)
#undef MOLE_SHARED_LOOPS

}  // namespace mole::inline MOLE_ABI::gated

// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/gated_rows_loops.hpp"

namespace mole::inline MOLE_ABI::gated {

#define MOLE_ROW_LOOPS(T)                                                                         \
  template void add_rows<T>(std::span<const std::int32_t>, std::span<const T>, MatView<const T>,  \
                            RowsBy, MatView<T>, RowsBy, const Context&) noexcept;                 \
  template void dot_rows<T>(const SlotLists&, MatView<const T>, RowsBy, MatView<const T>, RowsBy, \
                            std::span<const MatView<const T>>, MatView<const T>, RowsBy,          \
                            std::span<T>, const Context&) noexcept;                               \
  template void sum_rows<T>(std::span<const std::int32_t>, std::span<const T>, MatView<const T>,  \
                            RowsBy, MatView<T>, const Context&) noexcept;

MOLE_ROW_LOOPS(float)
MOLE_ROW_LOOPS(double)
#undef MOLE_ROW_LOOPS

}  // namespace mole::inline MOLE_ABI::gated

// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/gated_low_rank_loops.hpp"

namespace mole::inline MOLE_ABI::gated {

#define MOLE_GATED_LOOPS(T)                                                                       \
  template void down<T>(const SlotLists&, Slots, std::span<const Panels<T>>, MatView<const T>,    \
                        RowsBy, MatView<T>, const Context&) noexcept;                             \
  template void apply_gates<T>(const SlotLists&, std::span<const T>, std::span<const T>,          \
                               std::span<const Index>, MatView<const T>, RowsBy, MatView<T>,      \
                               const Context&) noexcept;                                          \
  template void up<T>(const SlotLists&, std::span<const T>, std::span<const T>, MatView<const T>, \
                      const Panels<T>&, std::span<const Index>, MatView<const T>, MatView<T>,     \
                      RowsBy, const Context&) noexcept;                                           \
  template void dense_forward<T>(                                                                 \
      MatView<const T>, std::span<const T>, MatView<const T>, std::span<const Panels<T>>,         \
      const Panels<T>&, std::span<const Index>, MatView<T>, MatView<T>, const Context&) noexcept; \
  template void up_transposed<T>(const SlotLists&, std::span<const MatView<const T>>,             \
                                 MatView<const T>, RowsBy, MatView<T>, const Context&) noexcept;  \
  template void down_transposed<T>(const SlotLists&, MatView<const T>,                            \
                                   std::span<const MatView<const T>>, MatView<T>, RowsBy,         \
                                   const Context&) noexcept;                                      \
  template void up_gradient<T>(const SlotLists&, MatView<const T>, RowsBy, MatView<const T>,      \
                               std::span<const MatView<T>>, const Context&) noexcept;             \
  template void down_gradient<T>(const SlotLists&, MatView<const T>, MatView<const T>, RowsBy,    \
                                 std::span<const MatView<T>>, const Context&) noexcept;           \
  template void bias_gradient<T>(const SlotLists&, std::span<const T>, std::span<const T>,        \
                                 MatView<const T>, RowsBy, std::span<const MatView<T>>,           \
                                 const Context&) noexcept;                                        \
  template void gate_gradient<T>(const SlotLists&, std::span<const T>, std::span<const Index>,    \
                                 MatView<const T>, MatView<const T>, RowsBy,                      \
                                 std::span<const MatView<const T>>, MatView<const T>, RowsBy,     \
                                 std::span<T>, const Context&) noexcept;                          \
  template T dot<T>(std::span<const T>, std::span<const T>) noexcept;

MOLE_GATED_LOOPS(float)
MOLE_GATED_LOOPS(double)
#undef MOLE_GATED_LOOPS

}  // namespace mole::inline MOLE_ABI::gated

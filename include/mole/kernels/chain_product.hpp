// SPDX-License-Identifier: Apache-2.0
// The one matrix product of the library. Every output element is a single chain of fused
// multiply-adds over the depth, in ascending order, started from 0 or from what is stored:
//
//   c(m, n) <- fma(a(m, k), b(k, n), c(m, n))   for k = 0, 1, ..., depth - 1
//
// Tiles, vector widths and blocks decide which chains run side by side, never the order inside one,
// so every path gives the same bits. A chain may stop, be stored and go on later.
#pragma once

#include <cstdint>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/half.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// Rows picked from a matrix: row i starts at data + index[i] * stride, or + i * stride without
/// index.
template <class T>
struct RowList {
  T* data = nullptr;
  Index stride = 0;
  const std::int32_t* index = nullptr;

  RowList() = default;
  RowList(MatView<T> view, const std::int32_t* index = nullptr) noexcept  // NOLINT
      : data(view.data), stride(view.stride), index(index) {}

  T* row(Index i) const noexcept { return data + (index != nullptr ? index[i] : i) * stride; }
};

/// c = a b, rows x depth times depth x cols. With `a_by_depth`, a is stored depth-first:
/// a(m, k) = a.row(k)[m]; this is the form of parameter gradients, sums over tokens. `b` may have
/// an index only then. No operand may overlap c.
template <class T>
struct ChainProduct {
  Index rows = 0, depth = 0, cols = 0;
  RowList<const T> a;
  RowList<const T> b;
  RowList<T> c;
  bool a_by_depth = false;
  bool from_zero = false;
};

template <class T>
void chain_product(const ChainProduct<T>& product, Isa isa) noexcept;

/// Weights packed once: the transposed weight [depth, cols], cut into panels of kPanel columns,
/// each panel contiguous with its own width as row stride. depth * cols elements, nothing padded.
inline constexpr Index kPanel = 64;

template <class T>
struct Panels {
  const T* data = nullptr;
  Index depth = 0, cols = 0;

  Index count() const noexcept { return (cols + kPanel - 1) / kPanel; }
  MatView<const T> panel(Index p) const noexcept {
    const Index width = cols - p * kPanel < kPanel ? cols - p * kPanel : kPanel;
    return {data + p * kPanel * depth, depth, width};
  }
};

/// Memory for panels, from a Workspace or a ByteCounter.
template <class T, class Arena>
Panels<T> take_panels(Arena& arena, Index depth, Index cols) {
  return {arena.template take<T>(depth, cols).data, depth, cols};
}

/// Packs a weight [cols, rows] (PyTorch orientation), widening its elements, into rows
/// [first, first + rows) of `panels`, whose memory must be writable.
template <class T, class W>
void pack_rows(MatView<const W> weight, Index first, const Panels<T>& panels) noexcept {
  for (Index p = 0; p < panels.count(); ++p) {
    const MatView<const T> panel = panels.panel(p);
    T* const to = const_cast<T*>(panel.data) + first * panel.cols;
    for (Index n = 0; n < panel.cols; ++n) {
      for (Index k = 0; k < weight.cols; ++k) {
        to[k * panel.cols + n] = widen<T>(weight(p * kPanel + n, k));
      }
    }
  }
}

/// Packs one weight [cols, depth] into `memory` of cols * depth elements.
template <class T, class W>
Panels<T> pack_panels(MatView<const W> weight, T* memory) noexcept {
  const Panels<T> panels{memory, weight.cols, weight.rows};
  pack_rows(weight, 0, panels);
  return panels;
}

/// Columns of panels [first, last): c(:, these columns) = a * weightᵀ, or += with from_zero false.
/// `a` and `c` are whole rows; c's row starts at column 0.
template <class T>
void panel_product(RowList<const T> a, Index rows, const Panels<T>& weight, Index first, Index last,
                   RowList<T> c, bool from_zero, Isa isa) noexcept {
  for (Index p = first; p < last; ++p) {
    const MatView<const T> panel = weight.panel(p);
    ChainProduct<T> product;
    product.rows = rows;
    product.depth = panel.rows;
    product.cols = panel.cols;
    product.a = a;
    product.b = panel;
    product.c = c;
    product.c.data += p * kPanel;
    product.from_zero = from_zero;
    chain_product(product, isa);
  }
}

}  // namespace mole::inline MOLE_ABI

#ifdef MOLE_HEADER_ONLY
#include "mole/kernels/chain_product_portable.hpp"
#else
namespace mole::inline MOLE_ABI {
extern template void chain_product(const ChainProduct<float>&, Isa) noexcept;
extern template void chain_product(const ChainProduct<double>&, Isa) noexcept;
}  // namespace mole::inline MOLE_ABI
#endif

// SPDX-License-Identifier: Apache-2.0
// Definitions of kernels/dense.hpp.
#pragma once

#include <algorithm>

#include "mole/kernels/dense.hpp"
#include "mole/kernels/gated.hpp"

namespace mole::inline MOLE_ABI::dense {

/// Rows of a tile that share one panel while it is in cache.
inline constexpr Index kRowTile = 384;

/// body(row, rows, column, columns) over tiles of a matrix, in parallel. Row tiles run fastest
/// last, so that neighbouring tasks share the rows.
template <class Body>
void for_each_tile(Index rows, Index cols, Index work, const Context& context, Body&& body) {
  const Index row_tiles = (rows + kRowTile - 1) / kRowTile;
  const Index col_tiles = (cols + kPanel - 1) / kPanel;
  const auto run = [&](Index first, Index last, int) {
    for (Index i = first; i < last; ++i) {
      const Index row = i / col_tiles * kRowTile, col = i % col_tiles * kPanel;
      body(row, std::min(kRowTile, rows - row), col, std::min(kPanel, cols - col));
    }
  };
  const Index tile_work = std::min(rows, kRowTile) * std::min(cols, kPanel) * work;
  parallel_for(context, row_tiles * col_tiles, gated::grain_for(tile_work), run);
}

template <class T>
void forward(const Panels<T>& weight, MatView<const T> bias, MatView<const T> x, MatView<T> y,
             const Context& context) noexcept {
  const auto tile = [&](Index row, Index rows, Index col, Index cols) {
    panel_product<T>(x.row_block(row, rows), rows, weight, col / kPanel, col / kPanel + 1,
                     y.row_block(row, rows), true, context.isa);
    if (bias.empty()) return;
    for (Index t = row; t < row + rows; ++t) {
      for (Index n = col; n < col + cols; ++n) y(t, n) += bias(0, n);
    }
  };
  for_each_tile(y.rows, y.cols, x.cols, context, tile);
}

template <class T>
void input_gradient(MatView<const T> weight, MatView<const T> dy, MatView<T> dx,
                    const Context& context) noexcept {
  const auto tile = [&](Index row, Index rows, Index col, Index cols) {
    ChainProduct<T> p;
    p.rows = rows;
    p.depth = weight.rows;
    p.cols = cols;
    p.a = dy.row_block(row, rows);
    p.b = weight.col_block(col, cols);
    p.c = dx.row_block(row, rows).col_block(col, cols);
    chain_product(p, context.isa);
  };
  for_each_tile(dx.rows, dx.cols, weight.rows, context, tile);
}

template <class T>
void weight_gradient(MatView<const T> x, MatView<const T> dy, MatView<T> dweight,
                     const Context& context) noexcept {
  const auto tile = [&](Index row, Index rows, Index col, Index cols) {
    ChainProduct<T> p;
    p.rows = rows;
    p.depth = x.rows;
    p.cols = cols;
    p.a = dy.col_block(row, rows);
    p.b = x.col_block(col, cols);
    p.c = dweight.row_block(row, rows).col_block(col, cols);
    p.a_by_depth = true;
    chain_product(p, context.isa);
  };
  for_each_tile(dweight.rows, dweight.cols, x.rows, context, tile);
}

template <class T>
void bias_gradient(MatView<const T> dy, MatView<T> dbias) noexcept {
  for (Index t = 0; t < dy.rows; ++t) {
    for (Index n = 0; n < dy.cols; ++n) dbias(0, n) += dy(t, n);
  }
}

}  // namespace mole::inline MOLE_ABI::dense

// SPDX-License-Identifier: Apache-2.0
// The portable tile of kernels/chain_product.hpp: fixed-size Eigen arrays, one row of accumulators
// per output row. The multiply-add is always fused: with Eigen's packets where the compiler may use
// hardware FMA, through std::fma otherwise (same bits, slower).
#pragma once

#include <Eigen/Core>
#include <cmath>

#include "mole/kernels/chain_product.hpp"

namespace mole::inline MOLE_ABI::portable {

#if defined(EIGEN_VECTORIZE_FMA) || (defined(EIGEN_VECTORIZE_NEON) && defined(__ARM_FEATURE_FMA))
inline constexpr bool kPacketFma = true;
#else
inline constexpr bool kPacketFma = false;
#endif

/// (b, c) -> fma(a, b, c) for Eigen's binaryExpr.
template <class T>
struct FusedMultiplyAdd {
  T a;
  T operator()(const T& b, const T& c) const { return std::fma(a, b, c); }
  template <class Packet>
  Packet packetOp(const Packet& b, const Packet& c) const {
    return Eigen::internal::pmadd(Eigen::internal::pset1<Packet>(a), b, c);
  }
};

inline constexpr int kTileRows = 6;
inline constexpr int kTileCols = 16;

template <class T>
using TileRow = Eigen::Array<T, 1, kTileCols>;

/// Up to kTileCols elements; the rest of the row is 0.
template <class T>
TileRow<T> load(const T* from, Index width) {
  if (width == kTileCols) return Eigen::Map<const TileRow<T>>(from);
  TileRow<T> row = TileRow<T>::Zero();
  for (Index i = 0; i < width; ++i) row[i] = from[i];
  return row;
}

template <class T, int Rows>
void tile(const ChainProduct<T>& p, Index m, Index n, Index width) {
  TileRow<T> sum[Rows];
  for (int r = 0; r < Rows; ++r) {
    sum[r] = p.from_zero ? TileRow<T>(TileRow<T>::Zero()) : load<T>(p.c.row(m + r) + n, width);
  }
  for (Index k = 0; k < p.depth; ++k) {
    const TileRow<T> b = load<T>(p.b.row(k) + n, width);
    for (int r = 0; r < Rows; ++r) {
      const T a = p.a_by_depth ? p.a.row(k)[m + r] : p.a.row(m + r)[k];
      sum[r] = b.binaryExpr(sum[r], FusedMultiplyAdd<T>{a});
    }
  }
  for (int r = 0; r < Rows; ++r) {
    T* c = p.c.row(m + r) + n;
    for (Index i = 0; i < width; ++i) c[i] = sum[r][i];
  }
}

template <class T>
void chain_product(const ChainProduct<T>& p) {
  for (Index n = 0; n < p.cols; n += kTileCols) {
    const Index width = p.cols - n < kTileCols ? p.cols - n : kTileCols;
    Index m = 0;
    for (; m + kTileRows <= p.rows; m += kTileRows) tile<T, kTileRows>(p, m, n, width);
    for (; m < p.rows; ++m) tile<T, 1>(p, m, n, width);
  }
}

}  // namespace mole::inline MOLE_ABI::portable

template <class T>
struct Eigen::internal::functor_traits<mole::portable::FusedMultiplyAdd<T>> {
  enum { Cost = 1, PacketAccess = mole::portable::kPacketFma };
};

#ifdef MOLE_HEADER_ONLY
namespace mole::inline MOLE_ABI {
template <class T>
void chain_product(const ChainProduct<T>& product, Isa) noexcept {
  portable::chain_product(product);
}
}  // namespace mole::inline MOLE_ABI
#endif

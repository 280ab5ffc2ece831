// SPDX-License-Identifier: Apache-2.0
// Tiles with Google Highway, compiled once per instruction set. Levels without a fused multiply-add
// are left out: they could not give the same bits.
#include "kernels/chain_product_simd.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/chain_product_simd.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace mole::inline MOLE_ABI::simd::HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3

namespace hn = hwy::HWY_NAMESPACE;

constexpr int kRows = 6;
constexpr int kVectors = HWY_TARGET == HWY_AVX3 ? 4 : 2;

// Rows x Vectors accumulators; the last vector holds the columns under `tail`.
template <bool ByDepth, int Rows, int Vectors, class T>
HWY_INLINE void tile(const ChainProduct<T>& p, Index m, Index n, Index width) {
  const hn::ScalableTag<T> d;
  constexpr Index kLanes = hn::MaxLanes(hn::ScalableTag<T>());
  using V = hn::Vec<decltype(d)>;
  const auto tail = hn::FirstN(d, static_cast<size_t>(width - (Vectors - 1) * kLanes));

  V sum[Rows][Vectors];
  const T* a[Rows];
  HWY_UNROLL(8)
  for (int r = 0; r < Rows; ++r) {
    a[r] = ByDepth ? nullptr : p.a.row(m + r);
    const T* c = p.c.row(m + r) + n;
    HWY_UNROLL(8)
    for (int v = 0; v < Vectors; ++v) {
      if (p.from_zero) {
        sum[r][v] = hn::Zero(d);
      } else {
        sum[r][v] = v + 1 < Vectors ? hn::LoadU(d, c + v * kLanes)
                                    : hn::MaskedLoad(tail, d, c + v * kLanes);
      }
    }
  }

  const T* b = p.b.data + n;
  for (Index k = 0; k < p.depth; ++k) {
    const T* b_row = b;
    if constexpr (ByDepth) {
      b_row = p.b.row(k) + n;
    } else {
      b += p.b.stride;
    }
    const T* a_row = ByDepth ? p.a.row(k) + m : nullptr;
    V bv[Vectors];
    HWY_UNROLL(8)
    for (int v = 0; v < Vectors; ++v) {
      bv[v] = v + 1 < Vectors ? hn::LoadU(d, b_row + v * kLanes)
                              : hn::MaskedLoad(tail, d, b_row + v * kLanes);
    }
    HWY_UNROLL(8)
    for (int r = 0; r < Rows; ++r) {
      const V av = hn::Set(d, ByDepth ? a_row[r] : a[r][k]);
      HWY_UNROLL(8)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = hn::MulAdd(av, bv[v], sum[r][v]);
    }
  }

  HWY_UNROLL(8)
  for (int r = 0; r < Rows; ++r) {
    T* c = p.c.row(m + r) + n;
    HWY_UNROLL(8)
    for (int v = 0; v + 1 < Vectors; ++v) hn::StoreU(sum[r][v], d, c + v * kLanes);
    hn::BlendedStore(sum[r][Vectors - 1], tail, d, c + (Vectors - 1) * kLanes);
  }
}

template <bool ByDepth, int Vectors, class T>
HWY_INLINE void columns(const ChainProduct<T>& p, Index n, Index width) {
  Index m = 0;
  for (; m + kRows <= p.rows; m += kRows) tile<ByDepth, kRows, Vectors>(p, m, n, width);
  switch (p.rows - m) {
    case 5: return tile<ByDepth, 5, Vectors>(p, m, n, width);
    case 4: return tile<ByDepth, 4, Vectors>(p, m, n, width);
    case 3: return tile<ByDepth, 3, Vectors>(p, m, n, width);
    case 2: return tile<ByDepth, 2, Vectors>(p, m, n, width);
    case 1: return tile<ByDepth, 1, Vectors>(p, m, n, width);
    default: return;
  }
}

template <bool ByDepth, class T>
HWY_INLINE void product(const ChainProduct<T>& p) {
  constexpr Index kLanes = hn::MaxLanes(hn::ScalableTag<T>());
  for (Index n = 0; n < p.cols; n += kVectors * kLanes) {
    const Index width = HWY_MIN(p.cols - n, kVectors * kLanes);
    switch ((width + kLanes - 1) / kLanes) {
#if HWY_TARGET == HWY_AVX3
      case 4: columns<ByDepth, 4>(p, n, width); break;
      case 3: columns<ByDepth, 3>(p, n, width); break;
#endif
      case 2: columns<ByDepth, 2>(p, n, width); break;
      default: columns<ByDepth, 1>(p, n, width); break;
    }
  }
}

template <class T>
HWY_INLINE void any_product(const ChainProduct<T>& p) {
  if (p.a_by_depth) {
    product<true>(p);
  } else {
    product<false>(p);
  }
}

void chain_product_float(const ChainProduct<float>& p) {
  any_product(p);
}
void chain_product_double(const ChainProduct<double>& p) {
  any_product(p);
}

#endif

}  // namespace mole::inline MOLE_ABI::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <hwy/targets.h>

namespace mole::inline MOLE_ABI::simd {

#if HWY_TARGETS & HWY_AVX2
void chain_product_avx2(const ChainProduct<float>& p) noexcept {
  N_AVX2::chain_product_float(p);
}
void chain_product_avx2(const ChainProduct<double>& p) noexcept {
  N_AVX2::chain_product_double(p);
}
bool has_avx2() noexcept {
  static const bool has = (hwy::SupportedTargets() & HWY_AVX2) != 0;  // CPUID is slow
  return has;
}
#else
void chain_product_avx2(const ChainProduct<float>&) noexcept {}
void chain_product_avx2(const ChainProduct<double>&) noexcept {}
bool has_avx2() noexcept {
  return false;
}
#endif

#if HWY_TARGETS & HWY_AVX3
void chain_product_avx512(const ChainProduct<float>& p) noexcept {
  N_AVX3::chain_product_float(p);
}
void chain_product_avx512(const ChainProduct<double>& p) noexcept {
  N_AVX3::chain_product_double(p);
}
bool has_avx512() noexcept {
  static const bool has = (hwy::SupportedTargets() & HWY_AVX3) != 0;  // CPUID is slow
  return has;
}
#else
void chain_product_avx512(const ChainProduct<float>&) noexcept {}
void chain_product_avx512(const ChainProduct<double>&) noexcept {}
bool has_avx512() noexcept {
  return false;
}
#endif

}  // namespace mole::inline MOLE_ABI::simd
#endif

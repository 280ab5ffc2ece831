// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/chain_product.hpp"

#include "kernels/chain_product_simd.hpp"
#include "mole/kernels/chain_product_portable.hpp"

namespace mole::inline MOLE_ABI {

bool isa_available(Isa isa) noexcept {
  switch (isa) {
    case Isa::avx512: return simd::has_avx512();
    case Isa::avx2: return simd::has_avx2();
    default: return true;
  }
}

Isa best_isa() noexcept {
  if (isa_available(Isa::avx512)) return Isa::avx512;
  return isa_available(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

template <class T>
void chain_product(const ChainProduct<T>& product, Isa isa) noexcept {
  if (isa == Isa::avx512 && simd::has_avx512()) return simd::chain_product_avx512(product);
  if (isa != Isa::portable && simd::has_avx2()) return simd::chain_product_avx2(product);
  portable::chain_product(product);
}

template void chain_product(const ChainProduct<float>&, Isa) noexcept;
template void chain_product(const ChainProduct<double>&, Isa) noexcept;

}  // namespace mole::inline MOLE_ABI

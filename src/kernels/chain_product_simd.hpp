// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "mole/kernels/chain_product.hpp"

namespace mole::inline MOLE_ABI::simd {

/// The tiles of kernels/chain_product.hpp for the two levels with vector FMA.
/// Only on a machine for which isa_available() says so.
void chain_product_avx2(const ChainProduct<float>& product) noexcept;
void chain_product_avx2(const ChainProduct<double>& product) noexcept;
void chain_product_avx512(const ChainProduct<float>& product) noexcept;
void chain_product_avx512(const ChainProduct<double>& product) noexcept;

/// Levels that this build contains and this machine runs.
bool has_avx2() noexcept;
bool has_avx512() noexcept;

}  // namespace mole::inline MOLE_ABI::simd

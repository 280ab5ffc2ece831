// SPDX-License-Identifier: Apache-2.0
// The base weight that an adapter started from its leading part belongs to: what is left of W.
//
//   PiSSA   W_res = W - U_r S_r V_rᵀ           W = U S Vᵀ    (Meng et al., 2024)
//   OLoRA   W_res = W - scale · Q_r R_r        W = Q R       (Büyükakyüz, 2024)
//
//   U_r, V_r, Q_r: the first r columns    R_r: the first r rows    W [out, in] as it is stored
//
// Both products are unique where the r-th and the next singular value differ, and where the first r
// columns of W are independent. Everything is computed in double and rounded once.
//
// Needs the compiled library.
#pragma once

#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// PiSSA's base weight. A transposed weight gives the transposed result; `residual` may be
/// `weight`. Throws shape_mismatch; invalid_argument unless 1 <= rank <= both sides of W;
/// numeric_error if W holds NaN or infinity.
template <class T>
void pissa_residual(std::type_identity_t<MatView<const T>> weight, Index rank, MatView<T> residual);

/// OLoRA's base weight, of the weight as it is stored: a transposed one has other Q and R.
/// `residual` may be `weight`. Throws as pissa_residual.
template <class T>
void olora_residual(std::type_identity_t<MatView<const T>> weight, Index rank, double scale,
                    MatView<T> residual);

}  // namespace mole::inline MOLE_ABI

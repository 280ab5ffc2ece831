// SPDX-License-Identifier: Apache-2.0
// Dense linear maps with one order of summation.
//
//   forward    y[t]  = x[t] Wᵀ (+ b)         one chain over the inputs, then the bias
//   backward   dx[t] += dy[t] W              one chain over the outputs, from dx
//              dW    += Σ_t dy[t] x[t]ᵀ      one chain over the tokens, from dW
//              db    += Σ_t dy[t]
//
// x [tokens, in]   W [out, in]   b [1, out]   y [tokens, out]
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/chain_product.hpp"

namespace mole::inline MOLE_ABI::dense {

/// y is overwritten. An empty bias is no bias.
template <class T>
void forward(const Panels<T>& weight, MatView<const T> bias, MatView<const T> x, MatView<T> y,
             const Context& context) noexcept;

template <class T>
void input_gradient(MatView<const T> weight, MatView<const T> dy, MatView<T> dx,
                    const Context& context) noexcept;

template <class T>
void weight_gradient(MatView<const T> x, MatView<const T> dy, MatView<T> dweight,
                     const Context& context) noexcept;

template <class T>
void bias_gradient(MatView<const T> dy, MatView<T> dbias) noexcept;

}  // namespace mole::inline MOLE_ABI::dense

#ifdef MOLE_HEADER_ONLY
#include "mole/kernels/dense_loops.hpp"
#endif

// SPDX-License-Identifier: Apache-2.0
// Activations of feed-forward blocks, and their gated product.
//
//   silu       v σ(v)
//   gelu       v Φ(v), Φ the normal distribution, not 1 + erf: accurate in the lower tail
//   gelu_tanh  v σ(2 √(2/π) (v + 0.044715 v³)), the form with tanh
//   relu       v above 0, else 0; its slope at 0 is 0
//
// gate, up, active [rows, width]; only the listed rows are read and written.
#pragma once

#include <array>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/shared_low_rank.hpp"

namespace mole::inline MOLE_ABI {

enum class Activation { silu, gelu, gelu_tanh, relu };
constexpr std::array<std::string_view, 4> enum_names(Activation) noexcept {
  return {"silu", "gelu", "gelu_tanh", "relu"};
}

namespace gated {

/// active = act(gate) ∘ up, or act(gate) if `up` is empty.
template <class T>
void activate(Activation activation, Rows rows, MatView<const T> gate, MatView<const T> up,
              MatView<T> active, const Context& context) noexcept;

/// d_gate = d_active ∘ up ∘ act'(gate)   d_up = d_active ∘ act(gate)      both are overwritten;
/// `up` and `d_up` may be empty together.
template <class T>
void activate_backward(Activation activation, Rows rows, MatView<const T> gate, MatView<const T> up,
                       MatView<const T> d_active, MatView<T> d_gate, MatView<T> d_up,
                       const Context& context) noexcept;

}  // namespace gated

}  // namespace mole::inline MOLE_ABI

#ifdef MOLE_HEADER_ONLY
#include "mole/kernels/activation_loops.hpp"
#endif

// SPDX-License-Identifier: Apache-2.0
// Folding a LoRA into a weight, and out of it again.
//
//   merge     W += s B A        unmerge: the same with -s        bias: b += s β
//
//   A = down [r, in]   B = up [out, r]   W [out, in], or [in, out] with fan_in_fan_out
#pragma once

#include <cmath>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/half.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// W += scale · B A; every (B A) element is one chain over the ranks. Throws shape_mismatch.
template <class T, class W>
void merge_lora(MatView<W> down, MatView<W> up, std::type_identity_t<T> scale, MatView<T> weight,
                bool fan_in_fan_out = false) {
  require_shape("up", up, up.rows, down.rows);
  require_shape("weight", weight, fan_in_fan_out ? down.cols : up.rows,
                fan_in_fan_out ? up.rows : down.cols);
  for (Index o = 0; o < up.rows; ++o) {
    for (Index i = 0; i < down.cols; ++i) {
      T delta = 0;
      for (Index r = 0; r < down.rows; ++r) {
        delta = std::fma(widen<T>(up(o, r)), widen<T>(down(r, i)), delta);
      }
      T& target = fan_in_fan_out ? weight(i, o) : weight(o, i);
      target = std::fma(scale, delta, target);
    }
  }
}

/// b += scale · β, both [1, out]. Throws shape_mismatch.
template <class T, class W>
void merge_lora_bias(MatView<W> lora_bias, std::type_identity_t<T> scale, MatView<T> bias) {
  require_shape("bias", bias, 1, lora_bias.cols);
  for (Index n = 0; n < bias.cols; ++n) {
    bias(0, n) = std::fma(scale, widen<T>(lora_bias(0, n)), bias(0, n));
  }
}

}  // namespace mole::inline MOLE_ABI

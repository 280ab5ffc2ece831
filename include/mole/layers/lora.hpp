// SPDX-License-Identifier: Apache-2.0
// Lora: one adapter on a linear map, or several that are all active (Hu et al., "LoRA: Low-Rank
// Adaptation of Large Language Models", ICLR 2022). The mixture whose gates are all 1.
//
//   y_t += Σ_e s_e (B_e A_e (x_t ∘ dropout_t) + β_e)     s = alpha / r, or alpha / sqrt(r) (rsLoRA)
//
//   x [tokens, in]   A = down [r, in]   B = up [out, r]   β = bias [1, out], optional
#pragma once

#include <cmath>

#include "mole/core/config.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/routers/unit.hpp"

namespace mole::inline MOLE_ABI {

/// alpha / rank, or alpha / sqrt(rank) with rank-stabilised scaling (Kalajdzievski, "A Rank
/// Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023).
/// Throws invalid_argument unless rank >= 1 and alpha is finite.
inline double lora_scale(double alpha, Index rank, bool rank_stabilised = false) {
  require(rank >= 1, Errc::invalid_argument, "lora_scale: rank must be at least 1, got ", rank);
  require(std::isfinite(alpha), Errc::invalid_argument, "lora_scale: alpha must be finite, got ",
          alpha);
  const auto r = static_cast<double>(rank);
  return alpha / (rank_stabilised ? std::sqrt(r) : r);
}

template <class T, class W = T>
class Lora : public Mixture<UnitRouter<T>, LoraBank<T, W>> {
 public:
  using Config = typename LoraBank<T, W>::Config;

  /// One entry of `rank` and `scale` per adapter.
  explicit Lora(Config config)
      : Mixture<UnitRouter<T>, LoraBank<T, W>>(
            UnitRouter<T>({.width = config.in, .experts = static_cast<Index>(config.rank.size())}),
            LoraBank<T, W>(config)) {}
};

}  // namespace mole::inline MOLE_ABI

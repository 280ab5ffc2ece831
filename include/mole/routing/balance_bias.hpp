// SPDX-License-Identifier: Apache-2.0
// Balancing without a loss: rules that move a router's buffers between steps, never inside forward.
//
//   bias     b_e <- b_e + rate · sign(mean(n) - n_e)      n = tokens that chose e since the last
//   update,
//            sign(0) = 0 [DeepSeek-V3, Wang et al., 2024; SMoRA]. Call it once an optimiser step,
//            with the counts of all micro-batches added up.
//   weight   w <- w · multiplier while the gates are less sparse than 1 - target_k / E, else
//            w / multiplier [ReMoE: weight of the sparsity loss]
#pragma once

#include <cmath>
#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

/// counts [experts] += active slots of every expert, of real tokens. Throws shape_mismatch.
template <class T>
void count_tokens(const Routing<T>& routing, std::span<std::int64_t> counts,
                  std::span<const std::uint8_t> mask = {}) {
  require(static_cast<Index>(counts.size()) == routing.experts, Errc::shape_mismatch,
          "counts: expected ", routing.experts, " values, got ", counts.size());
  require(mask.empty() || static_cast<Index>(mask.size()) == routing.tokens, Errc::shape_mismatch,
          "mask: expected ", routing.tokens, " values, got ", mask.size());
  for (Index t = 0; t < routing.tokens; ++t) {
    if (!mask.empty() && mask[t] == 0) continue;
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      counts[routing.expert[s]] += routing.gate[s] != T(0);
    }
  }
}

/// Throws shape_mismatch.
template <class T>
void update_selection_bias(double rate, std::span<const std::int64_t> counts, std::span<T> bias) {
  require(counts.size() == bias.size(), Errc::shape_mismatch, "counts: expected ", bias.size(),
          " values, got ", counts.size());
  std::int64_t total = 0;
  for (const std::int64_t n : counts) total += n;
  const auto experts = static_cast<std::int64_t>(counts.size());
  for (std::size_t e = 0; e < bias.size(); ++e) {
    const std::int64_t lack = total - experts * counts[e];
    const int sign = (lack > 0) - (lack < 0);
    bias[e] = static_cast<T>(std::fma(rate, sign, static_cast<double>(bias[e])));
  }
}

/// Share of gates [tokens, experts] that are not above 0.
template <class T>
double sparsity(MatView<const T> gate) noexcept {
  double zeros = 0;
  for (Index t = 0; t < gate.rows; ++t) {
    for (Index e = 0; e < gate.cols; ++e) zeros += !(gate(t, e) > T(0));
  }
  return gate.empty() ? 0 : zeros / static_cast<double>(gate.size());
}

/// The next weight of the sparsity loss.
inline double update_sparsity_weight(double weight, double multiplier, double sparsity,
                                     double target_k, Index experts) noexcept {
  const double wanted = 1 - target_k / static_cast<double>(experts);
  return sparsity < wanted ? weight * multiplier : weight / multiplier;
}

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// The balance loss of StableMoE: gates cost where an expert has more tokens than its share, and pay
// where it has fewer.
//
//   loss = weight · Σ_e (n_e / n̄ - 1) Σ_t g_te      n̄ = Σ_e n_e / E
//
// n_e = number of slots of expert e with a gate that is not 0, of real tokens, a constant in the
// gradient: dgate of a slot of e += weight (n_e / n̄ - 1). It is a sum over the tokens, not a mean.
//
// Dai et al., "StableMoE: Stable Routing Strategy for Mixture of Experts", 2022: sigmoid gates, one
// expert a token, weight 0.3.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/losses/token_mask.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

/// dgate [1, slots or more], as the tape has it, or empty. Throws shape_mismatch.
template <class T>
T excess_balance_loss(std::type_identity_t<T> weight, const Routing<T>& routing,
                      std::type_identity_t<MatView<T>> dgate, const Context& context,
                      const TokenMask& mask = {});

template <class T>
T excess_balance_loss(std::type_identity_t<T> weight, const Routing<T>& routing,
                      std::type_identity_t<MatView<T>> dgate, const Context& context,
                      const TokenMask& mask) {
  mask.check(routing.tokens);
  require(dgate.data == nullptr || (dgate.rows == 1 && dgate.cols >= routing.slots()),
          Errc::shape_mismatch, "dgate: expected 1 row of at least ", routing.slots(),
          " columns, got ", dgate.rows, " of ", dgate.cols);
  const Workspace::Frame frame(context.scratch);
  const auto factor = context.scratch.take<double>(routing.experts);
  std::fill(factor.begin(), factor.end(), 0.0);
  const auto each_slot = [&](auto body) {
    for (Index t = 0; t < routing.tokens; ++t) {
      if (!mask.is_real(t)) continue;
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        if (routing.gate[s] != T(0)) body(s, routing.expert[s]);
      }
    }
  };
  double slots = 0;
  each_slot([&](Index, Index e) { ++factor[e], ++slots; });
  if (slots == 0) return T(0);
  const double mean = slots / static_cast<double>(routing.experts);
  for (double& f : factor) f = static_cast<double>(weight) * (f / mean - 1);
  double loss = 0;
  each_slot([&](Index s, Index e) {
    loss = std::fma(factor[e], static_cast<double>(routing.gate[s]), loss);
    if (dgate.data != nullptr) dgate(0, s) += static_cast<T>(factor[e]);
  });
  return static_cast<T>(loss);
}

#ifndef MOLE_HEADER_ONLY
extern template float excess_balance_loss(float, const Routing<float>&, MatView<float>,
                                          const Context&, const TokenMask&);
extern template double excess_balance_loss(double, const Routing<double>&, MatView<double>,
                                           const Context&, const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// The load balance loss of Switch, Mixtral, MixLoRA and MoLA.
//
//   loss = weight · E · Σ_e f_e P_e       P_e = (1/N) Σ_t prob(t, e)
//   f_e = n_e / N (per_token)             n_e = number of active slots of expert e
//   f_e = n_e / Σ n (per_selection)       N   = number of real tokens
//
// With perfect balance and k experts a token the value is weight · k (per_token) or weight
// (per_selection). f is a constant in the gradient: dprob(t, e) += weight · E · f_e / N for real
// tokens. Without a real token, or with nothing selected, the loss is 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

/// What the counts of the balance loss are divided by.
enum class LoadPer { token, selection };

template <class T>
struct BalanceLoss {
  T weight = T(1);
  LoadPer load_per = LoadPer::token;
  std::span<const std::uint8_t> mask = {};  ///< [tokens], 1 = real token; empty: all real
  /// Counts every slot. For a routing without probes: a selected expert whose gate has underflowed
  /// to 0 counts too.
  bool count_zero_gates = false;
};

/// prob [tokens, experts]: the scores of the router's tape; rows beyond the tokens of the routing,
/// as a tape for larger calls has them, are not looked at. dprob may be empty. Tokens are summed in
/// ascending order, in double. Throws shape_mismatch.
template <class T>
T balance_loss(const BalanceLoss<T>& loss, const Routing<T>& routing,
               std::type_identity_t<MatView<const T>> prob, std::type_identity_t<MatView<T>> dprob,
               const Context& context);

template <class T>
T balance_loss(const BalanceLoss<T>& loss, const Routing<T>& routing,
               std::type_identity_t<MatView<const T>> prob, std::type_identity_t<MatView<T>> dprob,
               const Context& context) {
  const Index tokens = routing.tokens, experts = routing.experts;
  require(prob.rows >= tokens, Errc::shape_mismatch, "prob: expected at least ", tokens,
          " rows, got ", prob.rows);
  require_shape("prob", prob, prob.rows, experts);
  if (dprob.data != nullptr) require_shape("dprob", dprob, prob.rows, experts);
  require(loss.mask.empty() || static_cast<Index>(loss.mask.size()) == tokens, Errc::shape_mismatch,
          "mask: expected ", tokens, " values, got ", loss.mask.size());
  const auto is_real = [&](Index t) { return loss.mask.empty() || loss.mask[t] != 0; };

  const Workspace::Frame frame(context.scratch);
  const std::span<double> count = context.scratch.take<double>(experts);
  const std::span<double> sum = context.scratch.take<double>(experts);
  std::fill(count.begin(), count.end(), 0.0);
  std::fill(sum.begin(), sum.end(), 0.0);
  double real = 0, selected = 0;
  for (Index t = 0; t < tokens; ++t) {
    if (!is_real(t)) continue;
    ++real;
    for (Index e = 0; e < experts; ++e) sum[e] += prob(t, e);
    for (Index slot = routing.token_begin[t]; slot < routing.token_begin[t + 1]; ++slot) {
      if (routing.gate[slot] == T(0) && !loss.count_zero_gates) continue;
      ++count[routing.expert[slot]];
      ++selected;
    }
  }
  const double divisor = loss.load_per == LoadPer::token ? real : selected;
  if (selected == 0) return T(0);

  double value = 0;
  for (Index e = 0; e < experts; ++e) {
    const double load = count[e] / divisor;
    count[e] = loss.weight * static_cast<double>(experts) * load / real;
    value = std::fma(count[e], sum[e], value);
  }
  for (Index t = 0; t < tokens && dprob.data != nullptr; ++t) {
    for (Index e = 0; e < experts && is_real(t); ++e) dprob(t, e) += static_cast<T>(count[e]);
  }
  return static_cast<T>(value);
}

#ifndef MOLE_HEADER_ONLY
extern template float balance_loss(const BalanceLoss<float>&, const Routing<float>&,
                                   MatView<const float>, MatView<float>, const Context&);
extern template double balance_loss(const BalanceLoss<double>&, const Routing<double>&,
                                    MatView<const double>, MatView<double>, const Context&);
#endif

}  // namespace mole::inline MOLE_ABI

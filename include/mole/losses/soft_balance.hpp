// SPDX-License-Identifier: Apache-2.0
// Balance losses whose load is differentiable too.
//
//   soft balance     weight · E · Σ_e a_e P_e       a_e = (1/N) Σ_t gate(t, e), P_e = (1/N) Σ_t
//   p_te
//                    [DynMoLE; its N has 1e-8 added where there is a mask]
//   specialisation   weight · Σ_e P_e² - entropy_weight · (1/N) Σ_t H(p_t)       [LoRA-Mixer]
//
// N = number of real tokens. The specialisation loss with counted load instead of P_e is
// balance_loss with by_experts false, and entropy_loss with -entropy_weight.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/losses/add_product.hpp"
#include "mole/losses/entropy.hpp"
#include "mole/losses/token_mask.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct SoftBalancedLayer {
  Routing<T> routing;
  MatView<const T> prob;    ///< [tokens or more, experts]
  std::span<T> dgate = {};  ///< [slots] or longer, or empty
  MatView<T> dprob = {};    ///< or empty
};

/// The layers' tokens are pooled. `token_epsilon` is added to N. Throws shape_mismatch.
template <class T>
T soft_balance_loss(std::type_identity_t<T> weight,
                    std::type_identity_t<std::span<const SoftBalancedLayer<T>>> layers,
                    const Context& context, const TokenMask& mask = {}, double token_epsilon = 0);

/// prob [tokens, experts]; dprob likewise, or empty. Throws shape_mismatch.
template <class T>
T square_usage_loss(std::type_identity_t<T> weight, MatView<const T> prob,
                    std::type_identity_t<MatView<T>> dprob, const Context& context,
                    const TokenMask& mask = {});

template <class T>
T soft_balance_loss(std::type_identity_t<T> weight,
                    std::type_identity_t<std::span<const SoftBalancedLayer<T>>> layers,
                    const Context& context, const TokenMask& mask, double token_epsilon) {
  if (layers.empty()) return T(0);
  const Index experts = layers.front().routing.experts;
  const Workspace::Frame frame(context.scratch);
  const auto load = context.scratch.take<double>(experts),
             prob = context.scratch.take<double>(experts);
  std::fill(load.begin(), load.end(), 0.0);
  std::fill(prob.begin(), prob.end(), 0.0);
  double real = token_epsilon;
  for (const SoftBalancedLayer<T>& layer : layers) {
    const Routing<T>& routing = layer.routing;
    mask.check(routing.tokens);
    require_shape("prob", layer.prob, std::max(layer.prob.rows, routing.tokens), experts);
    if (layer.dprob.data != nullptr) require_shape("dprob", layer.dprob, layer.prob.rows, experts);
    require(layer.dgate.empty() || static_cast<Index>(layer.dgate.size()) >= routing.slots(),
            Errc::shape_mismatch, "dgate: expected ", routing.slots(), " values, got ",
            layer.dgate.size());
    real += mask.count(routing.tokens);
    for (Index t = 0; t < routing.tokens; ++t) {
      if (!mask.is_real(t)) continue;
      for (Index e = 0; e < experts; ++e) prob[e] += layer.prob(t, e);
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        load[routing.expert[s]] += routing.gate[s];
      }
    }
  }
  if (real <= 0) return T(0);
  const double factor = weight * static_cast<double>(experts) / (real * real);
  double loss = 0;
  for (Index e = 0; e < experts; ++e) loss = std::fma(factor * load[e], prob[e], loss);
  for (const SoftBalancedLayer<T>& layer : layers) {
    const Routing<T>& routing = layer.routing;
    for (Index t = 0; t < routing.tokens; ++t) {
      if (!mask.is_real(t)) continue;
      for (Index e = 0; layer.dprob.data != nullptr && e < experts; ++e) {
        add_product(layer.dprob(t, e), factor, load[e]);
      }
      for (Index s = routing.token_begin[t]; !layer.dgate.empty() && s < routing.token_begin[t + 1];
           ++s) {
        add_product(layer.dgate[s], factor, prob[routing.expert[s]]);
      }
    }
  }
  return static_cast<T>(loss);
}

template <class T>
T square_usage_loss(std::type_identity_t<T> weight, MatView<const T> prob,
                    std::type_identity_t<MatView<T>> dprob, const Context& context,
                    const TokenMask& mask) {
  mask.check(prob.rows);
  check_gradient("dprob", prob, dprob);
  const double real = mask.count(prob.rows);
  if (real == 0) return T(0);
  const Workspace::Frame frame(context.scratch);
  const std::span<const T> mean = detail::mean_row(prob, mask, real, context);
  double loss = 0;
  for (const T p : mean) loss = std::fma(weight * static_cast<double>(p), p, loss);
  for (Index t = 0; t < prob.rows && dprob.data != nullptr; ++t) {
    for (Index e = 0; e < prob.cols && mask.is_real(t); ++e) {
      dprob(t, e) += static_cast<T>(2 * weight * static_cast<double>(mean[e]) / real);
    }
  }
  return static_cast<T>(loss);
}

#ifndef MOLE_HEADER_ONLY
extern template float soft_balance_loss<float>(float, std::span<const SoftBalancedLayer<float>>,
                                               const Context&, const TokenMask&, double);
extern template double soft_balance_loss<double>(double, std::span<const SoftBalancedLayer<double>>,
                                                 const Context&, const TokenMask&, double);
extern template float square_usage_loss(float, MatView<const float>, MatView<float>, const Context&,
                                        const TokenMask&);
extern template double square_usage_loss(double, MatView<const double>, MatView<double>,
                                         const Context&, const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

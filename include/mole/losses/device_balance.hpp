// SPDX-License-Identifier: Apache-2.0
// The three balance losses of DeepSeekMoE and DeepSeek-V2: over experts, over devices, and over
// what is sent to devices. Devices are equal consecutive blocks of experts, D of them.
//
//   expert         Σ_e f_e P_e        f_e = E n_e / (k N)       P_e = (1/N) Σ_t p_te
//   device         Σ_d f'_d P'_d      f'_d = mean of f in the block      P'_d = sum of P in the
//   block communication  Σ_d f''_d P'_d     f''_d = D · (tokens with a choice on d) / (device_limit
//   · N)
//
// All f are constants in the gradient. Dai et al., "DeepSeekMoE", 2024; DeepSeek-V2, 2024.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/losses/add_product.hpp"
#include "mole/losses/token_mask.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct DeviceBalance {
  Index k = 1;             ///< experts a token
  Index devices = 1;       ///< divides the experts
  Index device_limit = 1;  ///< devices a token may reach
  T expert_weight = T(0), device_weight = T(0), communication_weight = T(0);
};

/// Each without its weight; `total` with them.
struct DeviceBalanceValue {
  double expert = 0, device = 0, communication = 0, total = 0;
};

/// prob [tokens or more, experts]; dprob likewise, or empty. Every slot counts. Throws
/// shape_mismatch or invalid_argument.
template <class T>
DeviceBalanceValue device_balance_loss(const DeviceBalance<T>& loss, const Routing<T>& routing,
                                       std::type_identity_t<MatView<const T>> prob,
                                       std::type_identity_t<MatView<T>> dprob,
                                       const Context& context, const TokenMask& mask = {});

template <class T>
DeviceBalanceValue device_balance_loss(const DeviceBalance<T>& loss, const Routing<T>& routing,
                                       std::type_identity_t<MatView<const T>> prob,
                                       std::type_identity_t<MatView<T>> dprob,
                                       const Context& context, const TokenMask& mask) {
  const Index tokens = routing.tokens, experts = routing.experts;
  mask.check(tokens);
  require_shape("prob", prob, std::max(prob.rows, tokens), experts);
  check_gradient("dprob", prob, dprob);
  require(loss.devices >= 1 && experts % loss.devices == 0, Errc::invalid_argument,
          "devices: expected a divisor of ", experts, " experts, got ", loss.devices);
  require(loss.k >= 1 && loss.device_limit >= 1, Errc::invalid_argument,
          "k and device_limit: ", "expected at least 1, got ", loss.k, " and ", loss.device_limit);
  const Index block = experts / loss.devices;
  const double real = mask.count(tokens);
  DeviceBalanceValue value;
  if (real == 0) return value;

  const Workspace::Frame frame(context.scratch);
  const auto load = context.scratch.take<double>(experts),
             mean = context.scratch.take<double>(experts);
  const auto sent = context.scratch.take<double>(loss.devices);
  for (const auto& row : {load, mean, sent}) std::fill(row.begin(), row.end(), 0.0);
  for (Index t = 0; t < tokens; ++t) {
    if (!mask.is_real(t)) continue;
    for (Index e = 0; e < experts; ++e) mean[e] += prob(t, e) / real;
    Index last = -1;  // experts ascend, so those of one device are neighbours
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      const Index e = routing.expert[s], device = e / block;
      load[e] += static_cast<double>(experts) / (static_cast<double>(loss.k) * real);
      if (device != last) sent[device] += 1;
      last = device;
    }
  }
  const double per_device =
      static_cast<double>(loss.devices) / (static_cast<double>(loss.device_limit) * real);
  for (Index d = 0; d < loss.devices; ++d) {
    double device_load = 0, device_mean = 0;
    for (Index e = d * block; e < (d + 1) * block; ++e) {
      value.expert = std::fma(load[e], mean[e], value.expert);
      device_load += load[e] / static_cast<double>(block);
      device_mean += mean[e];
    }
    const double reached = per_device * sent[d];
    value.device = std::fma(device_load, device_mean, value.device);
    value.communication = std::fma(reached, device_mean, value.communication);
    double shared = 0;
    add_product(shared, loss.device_weight, device_load);
    add_product(shared, loss.communication_weight, reached);
    for (Index e = d * block; e < (d + 1) * block; ++e) {
      mean[e] = std::fma(static_cast<double>(loss.expert_weight), load[e], shared) / real;
    }
  }
  for (Index t = 0; t < tokens && dprob.data != nullptr; ++t) {
    for (Index e = 0; e < experts && mask.is_real(t); ++e) dprob(t, e) += static_cast<T>(mean[e]);
  }
  add_product(value.total, loss.expert_weight, value.expert);
  add_product(value.total, loss.device_weight, value.device);
  add_product(value.total, loss.communication_weight, value.communication);
  return value;
}

#ifndef MOLE_HEADER_ONLY
extern template DeviceBalanceValue device_balance_loss(const DeviceBalance<float>&,
                                                       const Routing<float>&, MatView<const float>,
                                                       MatView<float>, const Context&,
                                                       const TokenMask&);
extern template DeviceBalanceValue device_balance_loss(const DeviceBalance<double>&,
                                                       const Routing<double>&,
                                                       MatView<const double>, MatView<double>,
                                                       const Context&, const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

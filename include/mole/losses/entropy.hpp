// SPDX-License-Identifier: Apache-2.0
// Losses on how decided the router is.
//
//   entropy              weight · (1/N) Σ_t H(p_t)          H: routing/entropy.hpp
//   entropy of the mean  weight · H((1/N) Σ_t p_t)
//   mutual information   weight · (Σ_e P_e ln P_e - (1/N) Σ_t Σ_e p_te ln p_te), P = (1/N) Σ_t p_t;
//                        least where each token is decided and all experts are used; 0 ln 0 = 0
//
// N = number of real tokens; without one the losses are 0. A negative weight sharpens or spreads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/losses/token_mask.hpp"
#include "mole/routing/entropy.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct EntropyLoss {
  T weight = T(1);
  Entropy<T> entropy = {};
  bool of_mean = false;  ///< the entropy of the mean scores instead of the mean entropy
};

/// prob [tokens, experts]; dprob likewise, or empty. Throws shape_mismatch.
template <class T>
T entropy_loss(const EntropyLoss<T>& loss, MatView<const T> prob,
               std::type_identity_t<MatView<T>> dprob, const Context& context,
               const TokenMask& mask = {});

template <class T>
T mutual_information_loss(std::type_identity_t<T> weight, MatView<const T> prob,
                          std::type_identity_t<MatView<T>> dprob, const Context& context,
                          const TokenMask& mask = {});

namespace detail {

/// mean [experts] of the rows of real tokens.
template <class T>
std::span<T> mean_row(MatView<const T> prob, const TokenMask& mask, double real,
                      const Context& context) {
  const auto sum = context.scratch.take<double>(prob.cols);
  const auto mean = context.scratch.template take<T>(prob.cols);
  std::fill(sum.begin(), sum.end(), 0.0);
  for (Index t = 0; t < prob.rows; ++t) {
    for (Index e = 0; e < prob.cols && mask.is_real(t); ++e) sum[e] += prob(t, e);
  }
  for (Index e = 0; e < prob.cols; ++e) mean[e] = static_cast<T>(sum[e] / real);
  return mean;
}

}  // namespace detail

template <class T>
T entropy_loss(const EntropyLoss<T>& loss, MatView<const T> prob,
               std::type_identity_t<MatView<T>> dprob, const Context& context,
               const TokenMask& mask) {
  mask.check(prob.rows);
  check_gradient("dprob", prob, dprob);
  const double real = mask.count(prob.rows);
  if (real == 0) return T(0);
  const T share = static_cast<T>(loss.weight / real);
  if (!loss.of_mean) {
    double sum = 0;
    for (Index t = 0; t < prob.rows; ++t) {
      if (!mask.is_real(t)) continue;
      sum += stages::entropy<T>(loss.entropy, prob.row(t));
      if (dprob.data != nullptr) {
        stages::entropy_backward<T>(loss.entropy, prob.row(t), share, dprob.row(t));
      }
    }
    return static_cast<T>(loss.weight * sum / real);
  }
  const Workspace::Frame frame(context.scratch);
  const std::span<T> mean = detail::mean_row(prob, mask, real, context);
  const auto dmean = context.scratch.template take<T>(prob.cols);
  std::fill(dmean.begin(), dmean.end(), T(0));
  stages::entropy_backward<T>(loss.entropy, mean, share, dmean);
  for (Index t = 0; t < prob.rows && dprob.data != nullptr; ++t) {
    for (Index e = 0; e < prob.cols && mask.is_real(t); ++e) dprob(t, e) += dmean[e];
  }
  return loss.weight * stages::entropy<T>(loss.entropy, mean);
}

template <class T>
T mutual_information_loss(std::type_identity_t<T> weight, MatView<const T> prob,
                          std::type_identity_t<MatView<T>> dprob, const Context& context,
                          const TokenMask& mask) {
  const Entropy<T> shannon{EntropyKind::shannon, T(1), T(0), false};
  const T of_tokens = entropy_loss<T>({weight, shannon, false}, prob, dprob, context, mask);
  return of_tokens + entropy_loss<T>({-weight, shannon, true}, prob, dprob, context, mask);
}

#ifndef MOLE_HEADER_ONLY
extern template float entropy_loss(const EntropyLoss<float>&, MatView<const float>, MatView<float>,
                                   const Context&, const TokenMask&);
extern template double entropy_loss(const EntropyLoss<double>&, MatView<const double>,
                                    MatView<double>, const Context&, const TokenMask&);
extern template float mutual_information_loss<float>(float, MatView<const float>, MatView<float>,
                                                     const Context&, const TokenMask&);
extern template double mutual_information_loss<double>(double, MatView<const double>,
                                                       MatView<double>, const Context&,
                                                       const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// The load loss of noisy top-k: the chance of every expert to be chosen again under fresh noise.
//
//   load_e = Σ_t Φ((l_te - limit_te) / sd_te)     sd = softplus(side) + noise_epsilon
//   limit_te = the (k+1)-th largest value of the row where e was chosen (z_te above it), else the
//   k-th loss = weight · cv²(load)
//
// The values are z (logit) or softmax(z) (prob: what one widely used implementation compares the
// logits with). Φ is the standard normal distribution; gradient flows through l, sd and both
// limits. With k = experts there is no (k+1)-th: load is the number of tokens and the loss has no
// gradient.
//
// Shazeer et al., "Outrageously Large Neural Networks", 2017.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/math.hpp"
#include "mole/losses/add_product.hpp"
#include "mole/losses/importance.hpp"
#include "mole/routing/score.hpp"
#include "mole/routing/select.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct NoisyLoad {
  double weight = 1;
  double epsilon = 1e-10;  ///< of cv²
  Index k = 2;
  T noise_epsilon = T(0.01);
  bool limit_is_prob = false;  ///< limits are softmax(z)
};

/// All [tokens, experts]: l and side as the tape of a NoisyTopKRouter has them, the noise of its
/// call. Adds into dlogits and dside (or empty). `load` [experts] is filled. Throws shape_mismatch.
template <class T>
T noisy_load_loss(const NoisyLoad<T>& loss, MatView<const T> logits,
                  std::type_identity_t<MatView<const T>> side,
                  std::type_identity_t<MatView<const T>> noise, std::span<double> load,
                  std::type_identity_t<MatView<T>> dlogits, std::type_identity_t<MatView<T>> dside,
                  const Context& context);

namespace detail {

inline double normal_cdf(double x) noexcept {
  return 0.5 * std::erfc(-x * 0.70710678118654752440);
}
inline double normal_density(double x) noexcept {
  return 0.39894228040143267794 * std::exp(-0.5 * x * x);
}

/// One token of the load: its noisy logits, and the values that limits are taken from.
template <class T>
struct NoisyRow {
  std::span<double> z, value, deviation, dz, dvalue, ddeviation;
  std::span<std::int32_t> best;  // k + 1

  void form(const NoisyLoad<T>& loss, std::span<const T> logits, std::span<const T> side,
            std::span<const T> noise) noexcept {
    for (std::size_t e = 0; e < z.size(); ++e) {
      deviation[e] = math::softplus<double>(side[e]) + loss.noise_epsilon;
      z[e] = value[e] =
          std::fma(static_cast<double>(noise[e]), deviation[e], static_cast<double>(logits[e]));
    }
    if (loss.limit_is_prob) stages::softmax<double>(z, value);
    stages::select_top_k<double>(z, best);
  }
  /// The expert whose value limits expert e.
  std::int32_t limit_of(std::size_t e) const noexcept {
    const std::int32_t next = best.back();
    return z[e] > value[next] ? next : best[best.size() - 2];
  }
  double argument(std::size_t e, double logit) const noexcept {
    return (logit - value[limit_of(e)]) / deviation[e];
  }
};

}  // namespace detail

template <class T>
T noisy_load_loss(const NoisyLoad<T>& loss, MatView<const T> logits,
                  std::type_identity_t<MatView<const T>> side,
                  std::type_identity_t<MatView<const T>> noise, std::span<double> load,
                  std::type_identity_t<MatView<T>> dlogits, std::type_identity_t<MatView<T>> dside,
                  const Context& context) {
  const Index tokens = logits.rows, experts = logits.cols;
  require_shape("side", side, tokens, experts);
  require_shape("noise", noise, tokens, experts);
  check_gradient("dlogits", logits, dlogits);
  check_gradient("dside", logits, dside);
  require(static_cast<Index>(load.size()) == experts, Errc::shape_mismatch, "load: expected ",
          experts, " values, got ", load.size());
  const CvSquared spread{loss.weight, loss.epsilon, true};
  if (loss.k >= experts) {
    std::fill(load.begin(), load.end(), static_cast<double>(tokens));
    return static_cast<T>(cv_squared(spread, load, {}));
  }
  const Workspace::Frame frame(context.scratch);
  const MatView<double> work = context.scratch.take<double>(7, experts);
  detail::NoisyRow<T> row{work.row(0),
                          work.row(1),
                          work.row(2),
                          work.row(3),
                          work.row(4),
                          work.row(5),
                          context.scratch.take<std::int32_t>(loss.k + 1)};
  const std::span<double> dload = work.row(6);
  std::fill(load.begin(), load.end(), 0.0);
  std::fill(dload.begin(), dload.end(), 0.0);
  for (Index t = 0; t < tokens; ++t) {
    row.form(loss, logits.row(t), side.row(t), noise.row(t));
    for (Index e = 0; e < experts; ++e) {
      load[e] += detail::normal_cdf(row.argument(static_cast<std::size_t>(e), logits(t, e)));
    }
  }
  const double value = cv_squared(spread, load, dload);
  for (Index t = 0; t < tokens && dlogits.data != nullptr; ++t) {
    row.form(loss, logits.row(t), side.row(t), noise.row(t));
    std::fill(row.dz.begin(), row.dz.end(), 0.0);
    std::fill(row.dvalue.begin(), row.dvalue.end(), 0.0);
    std::fill(row.ddeviation.begin(), row.ddeviation.end(), 0.0);
    for (Index e = 0; e < experts; ++e) {
      const auto i = static_cast<std::size_t>(e);
      const double argument = row.argument(i, logits(t, e));
      const double d = dload[i] * detail::normal_density(argument) / row.deviation[i];
      dlogits(t, e) += static_cast<T>(d);
      add_product(row.ddeviation[i], -d, argument);
      row.dvalue[row.limit_of(i)] -= d;
    }
    if (loss.limit_is_prob) {
      stages::softmax_backward<double>(row.value, row.dvalue, row.dz);
    } else {
      std::copy(row.dvalue.begin(), row.dvalue.end(), row.dz.begin());
    }
    for (Index e = 0; e < experts; ++e) {
      const auto i = static_cast<std::size_t>(e);
      dlogits(t, e) += static_cast<T>(row.dz[i]);
      if (dside.data == nullptr) continue;
      const double slope = math::sigmoid<double>(side(t, e));
      add_product(row.ddeviation[i], noise(t, e), row.dz[i]);
      add_product(dside(t, e), row.ddeviation[i], slope);
    }
  }
  return static_cast<T>(value);
}

#ifndef MOLE_HEADER_ONLY
extern template float noisy_load_loss(const NoisyLoad<float>&, MatView<const float>,
                                      MatView<const float>, MatView<const float>, std::span<double>,
                                      MatView<float>, MatView<float>, const Context&);
extern template double noisy_load_loss(const NoisyLoad<double>&, MatView<const double>,
                                       MatView<const double>, MatView<const double>,
                                       std::span<double>, MatView<double>, MatView<double>,
                                       const Context&);
#endif

}  // namespace mole::inline MOLE_ABI

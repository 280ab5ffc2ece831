// SPDX-License-Identifier: Apache-2.0
// AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, "Decoupled Weight Decay
// Regularization", ICLR 2019, Algorithm 2).
//
//   m <- β₁ m + (1 - β₁) g        m̂ = m / (1 - β₁ᵗ)
//   v <- β₂ v + (1 - β₂) g²       v̂ = v / (1 - β₂ᵗ)
//   θ <- θ - η (m̂ / (√v̂ + ε) + λ θ)
//
// η multiplies the decay too, as PyTorch does it. In the paper only the schedule multiplies the
// decay: its λ is our η λ at the multiplier 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/params.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

struct AdamWOptions {
  double learning_rate = 1e-3;  ///< η, at least 0
  double beta1 = 0.9;           ///< in [0, 1)
  double beta2 = 0.999;         ///< in [0, 1)
  double epsilon = 1e-8;        ///< positive
  double weight_decay = 1e-2;   ///< λ, at least 0
};

/// Step number `step` = 1, 2, ... on structs with `visit`. The moments start as zeros. A tensor
/// that `grad` leaves empty is frozen: neither it nor its moments are touched. Throws
/// invalid_argument or shape_mismatch, and then nothing has changed.
template <class P, class G>
void adamw_step(const P& params, const G& grad, const P& first_moment, const P& second_moment,
                const AdamWOptions& options, std::int64_t step);

/// The options and the step number, as what they mean for one element.
template <class T>
struct AdamWUpdate {
  T learning_rate, weight_decay, epsilon;
  T keep1, take1, correction1;  ///< β₁, 1 - β₁, 1 - β₁ᵗ
  T keep2, take2, correction2;

  /// Throws invalid_argument, naming the option.
  AdamWUpdate(const AdamWOptions& options, std::int64_t step);

  void operator()(std::span<T> theta, std::span<const T> g, std::span<T> m,
                  std::span<T> v) const noexcept;
};

template <class T>
AdamWUpdate<T>::AdamWUpdate(const AdamWOptions& options, std::int64_t step)
    : learning_rate(static_cast<T>(options.learning_rate)),
      weight_decay(static_cast<T>(options.weight_decay)),
      epsilon(static_cast<T>(options.epsilon)),
      keep1(static_cast<T>(options.beta1)),
      take1(static_cast<T>(1 - options.beta1)),
      correction1(static_cast<T>(1 - std::pow(options.beta1, static_cast<double>(step)))),
      keep2(static_cast<T>(options.beta2)),
      take2(static_cast<T>(1 - options.beta2)),
      correction2(static_cast<T>(1 - std::pow(options.beta2, static_cast<double>(step)))) {
  const auto check = [](bool good, const char* name, const char* expected, auto got) {
    require(good, Errc::invalid_argument, "AdamW: ", name, ": expected ", expected, ", got ", got);
  };
  const auto is_size = [](double value) { return value >= 0 && std::isfinite(value); };
  const auto is_decay = [](double beta) { return beta >= 0 && beta < 1; };
  check(is_size(options.learning_rate), "learning_rate", "at least 0", options.learning_rate);
  check(is_decay(options.beta1), "beta1", "a number in [0, 1)", options.beta1);
  check(is_decay(options.beta2), "beta2", "a number in [0, 1)", options.beta2);
  check(is_size(options.epsilon) && epsilon > 0, "epsilon", "a positive number", options.epsilon);
  check(is_size(options.weight_decay), "weight_decay", "at least 0", options.weight_decay);
  check(step >= 1, "step", "at least 1", step);
}

template <class T>
void AdamWUpdate<T>::operator()(std::span<T> theta, std::span<const T> g, std::span<T> m,
                                std::span<T> v) const noexcept {
  for (std::size_t i = 0; i < theta.size(); ++i) {
    m[i] = std::fma(keep1, m[i], take1 * g[i]);
    v[i] = std::fma(keep2, v[i], take2 * g[i] * g[i]);
    const T direction = m[i] / correction1 / (std::sqrt(v[i] / correction2) + epsilon);
    theta[i] = std::fma(-learning_rate, std::fma(weight_decay, theta[i], direction), theta[i]);
  }
}

template <class P, class G>
void adamw_step(const P& params, const G& grad, const P& first_moment, const P& second_moment,
                const AdamWOptions& options, std::int64_t step) {
  const auto check = [&](const Leaf& leaf, const auto& theta, const auto& g, const auto& m,
                         const auto& v) {
    AdamWUpdate<std::remove_cvref_t<decltype(*theta.data)>>(options, step);
    if (g.empty()) return;
    params::require_leaf_shape(leaf, g, theta.rows, theta.cols);
    params::require_leaf_shape(leaf, m, theta.rows, theta.cols);
    params::require_leaf_shape(leaf, v, theta.rows, theta.cols);
  };
  P::visit(check, params, grad, first_moment, second_moment);
  const auto update = [&](const Leaf&, const auto& theta, const auto& g, const auto& m,
                          const auto& v) {
    const AdamWUpdate<std::remove_cvref_t<decltype(*theta.data)>> one(options, step);
    if (g.empty()) return;
    for (Index r = 0; r < theta.rows; ++r) one(theta.row(r), g.row(r), m.row(r), v.row(r));
  };
  P::visit(update, params, grad, first_moment, second_moment);
}

#ifndef MOLE_HEADER_ONLY
extern template struct AdamWUpdate<float>;
extern template struct AdamWUpdate<double>;
#endif

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// Stage `weight`: the gates of the experts one token has selected.
//
//   g_e = scale · s_e                        s = score(u)
//   g_e = scale · s_e / (Σ_S s + epsilon)    with renormalise
//   g_e = scale · e^u_e / Σ_S e^u            softmax over_selection, S the selected experts
//
// Without epsilon the last two are shares of the selection; they are formed from ln s, so they hold
// where every score underflows. One selected expert then has the gate `scale` and no gradient.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/routing/score.hpp"

namespace mole::inline MOLE_ABI {

/// What a top-k does first. It says what softmax sums over: all experts, or the selected.
enum class TopKOrder { score_then_topk, topk_then_score };
constexpr std::array<std::string_view, 2> enum_names(TopKOrder) noexcept {
  return {"score_then_topk", "topk_then_score"};
}

template <class T>
struct Weighting {
  Score score = Score::softmax;
  bool over_selection = false;  ///< softmax runs over the selected experts only
  bool renormalise = false;
  T epsilon = T(0);
  T scale = T(1);

  /// The gates are shares: they do not read the scores.
  bool shares() const noexcept {
    return (score == Score::softmax && over_selection) || (renormalise && epsilon == T(0));
  }
};

namespace stages {

/// gate [count] of the experts `chosen` [count]; u and s are rows over all experts.
template <class T>
void weigh(const Weighting<T>& how, std::span<const T> u, std::span<const T> s,
           std::span<const std::int32_t> chosen, std::span<T> gate) noexcept;

/// Adds into ds, or, for shares, into du (all experts). `work` [count] is overwritten.
template <class T>
void weigh_backward(const Weighting<T>& how, std::span<const T> u, std::span<const T> s,
                    std::span<const std::int32_t> chosen, std::span<const T> dgate, std::span<T> ds,
                    std::span<T> du, std::span<T> work) noexcept;

/// Adds into dvalue (all experts) the gradient that arrives by the gates value / sum of the chosen;
/// a sum of 0 has divided by 1.
template <class T>
void shares_backward(std::span<const std::int32_t> chosen, std::span<const T> gate,
                     std::span<const T> dgate, T sum, std::span<T> dvalue) noexcept;

/// Scale of the shares: softmax over the selection, renormalised once more, sums to 1 + epsilon.
template <class T>
T share_scale(const Weighting<T>& how) noexcept {
  return how.renormalise ? how.scale / (T(1) + how.epsilon) : how.scale;
}

template <class T>
void share_of_selection(const Weighting<T>& how, std::span<const T> u,
                        std::span<const std::int32_t> chosen, std::span<T> share) noexcept {
  for (std::size_t i = 0; i < chosen.size(); ++i) share[i] = log_score(how.score, u[chosen[i]]);
  softmax<T>(share, share);
}

/// Σ_S s + epsilon, or 1 without renormalise. A sum of 0 divides by 1.
template <class T>
T divisor(const Weighting<T>& how, std::span<const T> s,
          std::span<const std::int32_t> chosen) noexcept {
  if (!how.renormalise) return T(1);
  T sum = T(0);
  for (const std::int32_t e : chosen) sum += s[e];
  sum += how.epsilon;
  return sum == T(0) ? T(1) : sum;
}

template <class T>
void weigh(const Weighting<T>& how, std::span<const T> u, std::span<const T> s,
           std::span<const std::int32_t> chosen, std::span<T> gate) noexcept {
  if (how.shares()) {
    share_of_selection(how, u, chosen, gate);
    const T scale = share_scale(how);
    for (T& g : gate) g *= scale;
    return;
  }
  const T sum = divisor(how, s, chosen);
  for (std::size_t i = 0; i < chosen.size(); ++i) gate[i] = how.scale * (s[chosen[i]] / sum);
}

template <class T>
void weigh_backward(const Weighting<T>& how, std::span<const T> u, std::span<const T> s,
                    std::span<const std::int32_t> chosen, std::span<const T> dgate, std::span<T> ds,
                    std::span<T> du, std::span<T> work) noexcept {
  const bool shares = how.shares();
  const T sum = shares ? T(1) : divisor(how, s, chosen);
  if (shares) {
    share_of_selection(how, u, chosen, work);
  } else {
    for (std::size_t i = 0; i < chosen.size(); ++i) work[i] = s[chosen[i]] / sum;
  }
  T mean = T(0);
  if (shares || how.renormalise) {
    for (std::size_t i = 0; i < chosen.size(); ++i) mean = std::fma(work[i], dgate[i], mean);
  }
  const T scale = shares ? share_scale(how) : how.scale / sum;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const std::int32_t e = chosen[i];
    const T change = dgate[i] - mean;
    if (!shares) {
      ds[e] = std::fma(scale, change, ds[e]);
    } else if (work[i] != T(0) && std::isfinite(u[e])) {
      du[e] = std::fma(scale * work[i] * change, log_score_slope(how.score, u[e]), du[e]);
    }
  }
}

template <class T>
void shares_backward(std::span<const std::int32_t> chosen, std::span<const T> gate,
                     std::span<const T> dgate, T sum, std::span<T> dvalue) noexcept {
  const T divisor = sum == T(0) ? T(1) : sum;
  T mean = T(0);
  for (std::size_t i = 0; i < gate.size(); ++i) mean = std::fma(gate[i], dgate[i], mean);
  if (sum == T(0)) mean = T(0);
  for (std::size_t i = 0; i < gate.size(); ++i) {
    dvalue[chosen[i]] += (dgate[i] - mean) / divisor;
  }
}

#ifndef MOLE_HEADER_ONLY
extern template void shares_backward(std::span<const std::int32_t>, std::span<const float>,
                                     std::span<const float>, float, std::span<float>) noexcept;
extern template void shares_backward(std::span<const std::int32_t>, std::span<const double>,
                                     std::span<const double>, double, std::span<double>) noexcept;
extern template void weigh(const Weighting<float>&, std::span<const float>, std::span<const float>,
                           std::span<const std::int32_t>, std::span<float>) noexcept;
extern template void weigh(const Weighting<double>&, std::span<const double>,
                           std::span<const double>, std::span<const std::int32_t>,
                           std::span<double>) noexcept;
extern template void weigh_backward(const Weighting<float>&, std::span<const float>,
                                    std::span<const float>, std::span<const std::int32_t>,
                                    std::span<const float>, std::span<float>, std::span<float>,
                                    std::span<float>) noexcept;
extern template void weigh_backward(const Weighting<double>&, std::span<const double>,
                                    std::span<const double>, std::span<const std::int32_t>,
                                    std::span<const double>, std::span<double>, std::span<double>,
                                    std::span<double>) noexcept;
#endif

}  // namespace stages
}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// The balance losses of GShard, on first and on second choices.
//
//   first   mean over sequences of E Σ_e (n1_e / N) (1/N) Σ_t p_te       n1 = first choices
//   second  the same with n2 = second choices and p̃_te = p_te / (Σ_e p_te of the others + 1e-9), 0
//   for
//           the first choice
//
// Choices are those of the scores, before any dropping: the largest, and the largest of the rest,
// ties to the lower expert. N = real tokens of the sequence. Counts, and which choice is which, are
// constants in the gradient. Lepikhin et al., "GShard", 2021.
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
#include "mole/losses/add_product.hpp"
#include "mole/losses/token_mask.hpp"
#include "mole/routing/select.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct ChoiceBalance {
  T weight = T(1);
  T second_weight = T(0);  ///< 0.5 in GShard's option; the second loss is taken with it
  std::span<const std::int32_t> sequence_begin = {};  ///< [sequences + 1]; empty: one sequence
};

/// prob [tokens, experts]; dprob likewise, or empty. Throws shape_mismatch or invalid_argument.
template <class T>
T choice_balance_loss(const ChoiceBalance<T>& loss, MatView<const T> prob,
                      std::type_identity_t<MatView<T>> dprob, const Context& context,
                      const TokenMask& mask = {});

namespace detail {

inline constexpr double kChoiceEpsilon = 1e-9;

template <class T>
struct Choices {
  std::int32_t of[2] = {-1, -1};
  double rest = 0;  // Σ of the scores but the first, + epsilon

  explicit Choices(std::span<const T> prob) noexcept {
    const Index found =
        stages::select_top_k<T>(prob, std::span(of).first(std::min<std::size_t>(2, prob.size())));
    if (found < 2) of[1] = -1;
    rest = kChoiceEpsilon;
    for (std::size_t e = 0; e < prob.size(); ++e) {
      if (static_cast<std::int32_t>(e) != of[0]) rest += prob[e];
    }
  }
};

template <class T>
double choice_balance(const ChoiceBalance<T>& loss, MatView<const T> prob, MatView<T> dprob,
                      Index begin, Index end, double share, const TokenMask& mask,
                      MatView<double> work) {
  const Index experts = prob.cols;
  const auto first = work.row(0), second = work.row(1), sum = work.row(2), rest = work.row(3);
  for (Index i = 0; i < 4; ++i) std::fill(work.row(i).begin(), work.row(i).end(), 0.0);
  double real = 0;
  for (Index t = begin; t < end; ++t) {
    if (!mask.is_real(t)) continue;
    ++real;
    const Choices<T> choice(prob.row(t));
    first[choice.of[0]] += 1;
    if (choice.of[1] >= 0) second[choice.of[1]] += 1;
    for (Index e = 0; e < experts; ++e) {
      sum[e] += prob(t, e);
      if (e != choice.of[0]) rest[e] += prob(t, e) / choice.rest;
    }
  }
  if (real == 0) return 0;
  const double unit = share * static_cast<double>(experts) / (real * real);
  double value = 0;
  for (Index e = 0; e < experts; ++e) {
    first[e] *= unit * loss.weight;
    second[e] *= unit * loss.weight * loss.second_weight;
    add_product(value, first[e], sum[e]);
    add_product(value, second[e], rest[e]);
  }
  for (Index t = begin; t < end && dprob.data != nullptr; ++t) {
    if (!mask.is_real(t)) continue;
    const Choices<T> choice(prob.row(t));
    double mean = 0;
    for (Index e = 0; e < experts; ++e) {
      if (e != choice.of[0]) mean = std::fma(second[e], prob(t, e) / choice.rest, mean);
    }
    for (Index e = 0; e < experts; ++e) {
      const double of_rest = e == choice.of[0] ? 0 : (second[e] - mean) / choice.rest;
      dprob(t, e) += static_cast<T>(first[e] + of_rest);
    }
  }
  return value;
}

}  // namespace detail

template <class T>
T choice_balance_loss(const ChoiceBalance<T>& loss, MatView<const T> prob,
                      std::type_identity_t<MatView<T>> dprob, const Context& context,
                      const TokenMask& mask) {
  mask.check(prob.rows);
  check_gradient("dprob", prob, dprob);
  const auto begin = loss.sequence_begin;
  require(begin.empty() || (begin.front() == 0 && begin.back() == prob.rows &&
                            std::is_sorted(begin.begin(), begin.end())),
          Errc::invalid_argument, "sequence_begin: expected to ascend from 0 to ", prob.rows);
  const Workspace::Frame frame(context.scratch);
  const auto work = context.scratch.take<double>(4, prob.cols);
  if (begin.size() < 2) {
    return static_cast<T>(
        detail::choice_balance<T>(loss, prob, dprob, 0, prob.rows, 1, mask, work));
  }
  double value = 0;
  const double share = 1.0 / static_cast<double>(begin.size() - 1);
  for (std::size_t s = 0; s + 1 < begin.size(); ++s) {
    value +=
        detail::choice_balance<T>(loss, prob, dprob, begin[s], begin[s + 1], share, mask, work);
  }
  return static_cast<T>(value);
}

#ifndef MOLE_HEADER_ONLY
extern template float choice_balance_loss(const ChoiceBalance<float>&, MatView<const float>,
                                          MatView<float>, const Context&, const TokenMask&);
extern template double choice_balance_loss(const ChoiceBalance<double>&, MatView<const double>,
                                           MatView<double>, const Context&, const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

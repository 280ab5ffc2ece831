// SPDX-License-Identifier: Apache-2.0
// Losses on the spread of what the experts get.
//
//   cv²(v) = variance / (mean² + epsilon)      unbiased variance (n - 1), or of the population (n)
//
//   importance   weight · cv²(Σ_t gate(t, e))            [Shazeer et al., 2017: with the gates]
//   mean score   weight · cv²(mean_t prob(t, e))         [MixER: variance of the population]
//   localised    weight · cv² of V_be · (1 ± delta), V_be = Σ_t∈b prob(t, e), over all sequences
//   and
//                experts: + for experts of the half that the sequence's type (0 or 1) prefers, that
//                is e < E/2 for type 1, e >= E/2 for type 0, - for the other half and for other
//                types [LoRAMoE, Dou et al., 2024]
//
// One value has cv² 0.
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

namespace mole::inline MOLE_ABI {

struct CvSquared {
  double weight = 1;
  double epsilon = 1e-10;
  bool unbiased = true;
};

/// weight · cv²(values); dvalues [values] is added to, or empty.
inline double cv_squared(const CvSquared& how, std::span<const double> values,
                         std::span<double> dvalues) noexcept {
  const auto n = static_cast<double>(values.size());
  if (values.size() < 2) return 0;
  double mean = 0, variance = 0;
  for (const double v : values) mean += v;
  mean /= n;
  for (const double v : values) variance = std::fma(v - mean, v - mean, variance);
  const double freedom = how.unbiased ? n - 1 : n;
  variance /= freedom;
  const double square = std::fma(mean, mean, how.epsilon);
  if (square == 0) return 0;
  const double toward_mean = 2 * mean * variance / (n * square * square);
  for (std::size_t i = 0; i < dvalues.size(); ++i) {
    const double slope = std::fma(2 / (freedom * square), values[i] - mean, -toward_mean);
    dvalues[i] = std::fma(how.weight, slope, dvalues[i]);
  }
  return how.weight * variance / square;
}

/// Of the sums over real tokens of the columns of `value` [tokens, experts]: gates written densely,
/// or scores. `mean`: of the means instead. Throws shape_mismatch.
template <class T>
T importance_loss(const CvSquared& how, MatView<const T> value,
                  std::type_identity_t<MatView<T>> dvalue, const Context& context,
                  const TokenMask& mask = {}, bool mean = false);

template <class T>
struct LocalisedBalance {
  T weight = T(1), delta = T(0.1);
  std::span<const std::int32_t> types = {};           ///< [sequences]
  std::span<const std::int32_t> sequence_begin = {};  ///< [sequences + 1]
};

/// prob [tokens, experts], an even number of experts. Throws shape_mismatch or invalid_argument.
template <class T>
T localised_balance_loss(const LocalisedBalance<T>& loss, MatView<const T> prob,
                         std::type_identity_t<MatView<T>> dprob, const Context& context,
                         const TokenMask& mask = {});

template <class T>
T importance_loss(const CvSquared& how, MatView<const T> value,
                  std::type_identity_t<MatView<T>> dvalue, const Context& context,
                  const TokenMask& mask, bool mean) {
  mask.check(value.rows);
  check_gradient("dvalue", value, dvalue);
  const Workspace::Frame frame(context.scratch);
  const auto sum = context.scratch.take<double>(value.cols);
  const auto dsum = context.scratch.take<double>(value.cols);
  std::fill(sum.begin(), sum.end(), 0.0);
  std::fill(dsum.begin(), dsum.end(), 0.0);
  const double unit = mean ? 1 / std::max(mask.count(value.rows), 1.0) : 1.0;
  for (Index t = 0; t < value.rows; ++t) {
    for (Index e = 0; e < value.cols && mask.is_real(t); ++e)
      add_product(sum[e], unit, value(t, e));
  }
  const double loss = cv_squared(how, sum, dsum);
  for (Index t = 0; t < value.rows && dvalue.data != nullptr; ++t) {
    for (Index e = 0; e < value.cols && mask.is_real(t); ++e) {
      add_product(dvalue(t, e), unit, dsum[e]);
    }
  }
  return static_cast<T>(loss);
}

template <class T>
T localised_balance_loss(const LocalisedBalance<T>& loss, MatView<const T> prob,
                         std::type_identity_t<MatView<T>> dprob, const Context& context,
                         const TokenMask& mask) {
  const Index experts = prob.cols;
  const auto begin = loss.sequence_begin;
  mask.check(prob.rows);
  check_gradient("dprob", prob, dprob);
  require(experts % 2 == 0, Errc::invalid_argument,
          "prob: expected an even number of experts, got ", experts);
  require(!begin.empty() && begin.front() == 0 && begin.back() == prob.rows &&
              std::is_sorted(begin.begin(), begin.end()),
          Errc::invalid_argument, "sequence_begin: expected to ascend from 0 to ", prob.rows);
  require(loss.types.size() + 1 == begin.size(), Errc::shape_mismatch, "types: expected ",
          begin.size() - 1, " values, got ", loss.types.size());
  const auto sequences = static_cast<Index>(loss.types.size());
  const Workspace::Frame frame(context.scratch);
  const auto sum = context.scratch.take<double>(sequences, experts);
  const auto dsum = context.scratch.take<double>(sequences, experts);
  const auto factor = [&](Index s, Index e) {
    const std::int32_t type = loss.types[s];
    const bool preferred = (type == 1 && 2 * e < experts) || (type == 0 && 2 * e >= experts);
    return preferred ? 1.0 + loss.delta : 1.0 - loss.delta;
  };
  for (Index s = 0; s < sequences; ++s) {
    for (Index e = 0; e < experts; ++e) {
      sum(s, e) = dsum(s, e) = 0;
      for (Index t = begin[s]; t < begin[s + 1]; ++t) {
        if (mask.is_real(t)) add_product(sum(s, e), factor(s, e), prob(t, e));
      }
    }
  }
  const auto all = static_cast<std::size_t>(sum.size());
  const double value =
      cv_squared({.weight = static_cast<double>(loss.weight)},
                 std::span<const double>(sum.data, all), std::span<double>(dsum.data, all));
  for (Index s = 0; s < sequences && dprob.data != nullptr; ++s) {
    for (Index t = begin[s]; t < begin[s + 1]; ++t) {
      for (Index e = 0; e < experts && mask.is_real(t); ++e) {
        add_product(dprob(t, e), factor(s, e), dsum(s, e));
      }
    }
  }
  return static_cast<T>(value);
}

#ifndef MOLE_HEADER_ONLY
extern template float importance_loss(const CvSquared&, MatView<const float>, MatView<float>,
                                      const Context&, const TokenMask&, bool);
extern template double importance_loss(const CvSquared&, MatView<const double>, MatView<double>,
                                       const Context&, const TokenMask&, bool);
extern template float localised_balance_loss(const LocalisedBalance<float>&, MatView<const float>,
                                             MatView<float>, const Context&, const TokenMask&);
extern template double localised_balance_loss(const LocalisedBalance<double>&,
                                              MatView<const double>, MatView<double>,
                                              const Context&, const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

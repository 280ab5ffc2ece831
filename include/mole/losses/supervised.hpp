// SPDX-License-Identifier: Apache-2.0
// Losses that tell the router, or what it feeds, the right answer.
//
//   domain        weight · mean_b -ln softmax(l_b)[domain_b]      l_b: logits of row b, or the mean
//   of
//                 several layers' logits of it                   [sentence-level routing]
//   correctness   weight · mean_te BCE(l_te, correct_te)         several experts may be right
//                                                                [DriftMoE]
//   ranking       mean over pairs of different rank of -ln σ(r_w - r_l), or of -(r_w - r_l); the
//                 smaller rank number wins; no pair: 0           [DMoERM]
//   triplet       mean_b max(0, cos(a, n) - cos(a, p) + margin)  [Uni-RAG]
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/math.hpp"
#include "mole/losses/add_product.hpp"
#include "mole/losses/token_mask.hpp"
#include "mole/routing/score.hpp"

namespace mole::inline MOLE_ABI {

/// logits [layers · rows, experts], layer by layer; domain [rows]. dlogits likewise, or empty.
/// Throws shape_mismatch, or invalid_argument for a domain that is no expert.
template <class T>
T domain_loss(std::type_identity_t<T> weight, MatView<const T> logits,
              std::span<const std::int32_t> domain, std::type_identity_t<MatView<T>> dlogits,
              const Context& context);

/// logits and correct (0 or 1) [tokens, experts]. Throws shape_mismatch.
template <class T>
T correctness_loss(std::type_identity_t<T> weight, MatView<const T> logits,
                   MatView<const std::uint8_t> correct, std::type_identity_t<MatView<T>> dlogits);

/// Whom correctness_loss should call right on one token: the experts whose most likely class is the
/// label; if there is none, the one that gives the label most. Ties go to the lower class and
/// expert. probability [experts, classes], correct [experts]. Throws shape_mismatch or
/// invalid_argument.
template <class T>
void mark_correct(MatView<const T> probability, Index label, std::span<std::uint8_t> correct) {
  require(static_cast<Index>(correct.size()) == probability.rows, Errc::shape_mismatch,
          "correct: expected ", probability.rows, " values, got ", correct.size());
  require(label >= 0 && label < probability.cols, Errc::invalid_argument, "label: ", label,
          " is not in 0 ... ", probability.cols - 1);
  Index best = 0;
  bool is_known = false;
  for (Index e = 0; e < probability.rows; ++e) {
    const std::span<const T> row = probability.row(e);
    const bool is_right = std::max_element(row.begin(), row.end()) - row.begin() == label;
    correct[static_cast<std::size_t>(e)] = is_right ? 1 : 0;
    is_known = is_known || is_right;
    if (probability(e, label) > probability(best, label)) best = e;
  }
  if (!is_known && !correct.empty()) correct[static_cast<std::size_t>(best)] = 1;
}

/// reward, rank [n]; dreward likewise, or empty. Throws shape_mismatch.
template <class T>
T ranking_loss(std::span<const T> reward, std::span<const std::int64_t> rank, bool log_sigmoid,
               std::type_identity_t<std::span<T>> dreward);

/// All [n, width]; gradients likewise, or empty. A zero vector has the cosine 0. Throws
/// shape_mismatch.
template <class T>
T triplet_loss(std::type_identity_t<T> margin, MatView<const T> anchor,
               std::type_identity_t<MatView<const T>> positive,
               std::type_identity_t<MatView<const T>> negative,
               std::type_identity_t<MatView<T>> danchor, std::type_identity_t<MatView<T>> dpositive,
               std::type_identity_t<MatView<T>> dnegative);

template <class T>
T domain_loss(std::type_identity_t<T> weight, MatView<const T> logits,
              std::span<const std::int32_t> domain, std::type_identity_t<MatView<T>> dlogits,
              const Context& context) {
  const auto rows = static_cast<Index>(domain.size());
  check_gradient("dlogits", logits, dlogits);
  require(rows > 0 ? logits.rows % rows == 0 : logits.rows == 0, Errc::shape_mismatch,
          "logits: expected a multiple of ", rows, " rows, got ", logits.rows);
  for (const std::int32_t d : domain) {
    require(d >= 0 && d < logits.cols, Errc::invalid_argument, "domain ", d, " is not in 0 ... ",
            logits.cols - 1);
  }
  if (rows == 0) return T(0);
  const Index layers = logits.rows / rows;
  const Workspace::Frame frame(context.scratch);
  const auto mean = context.scratch.take<double>(logits.cols),
             p = context.scratch.take<double>(logits.cols);
  double loss = 0;
  for (Index b = 0; b < rows; ++b) {
    std::fill(mean.begin(), mean.end(), 0.0);
    for (Index l = 0; l < layers; ++l) {
      for (Index e = 0; e < logits.cols; ++e) mean[e] += logits(l * rows + b, e);
    }
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (double& m : mean) {
      m /= static_cast<double>(layers);
      largest = std::max(largest, m);
    }
    for (const double m : mean) sum += math::exp<double>(m - largest);
    loss += largest + math::log<double>(sum) - mean[domain[b]];
    stages::softmax<double>(mean, p);
    p[domain[b]] -= 1;
    const double unit = weight / static_cast<double>(rows * layers);
    for (Index l = 0; l < layers && dlogits.data != nullptr; ++l) {
      for (Index e = 0; e < logits.cols; ++e) {
        add_product(dlogits(l * rows + b, e), unit, p[e]);
      }
    }
  }
  return static_cast<T>(weight * loss / static_cast<double>(rows));
}

template <class T>
T correctness_loss(std::type_identity_t<T> weight, MatView<const T> logits,
                   MatView<const std::uint8_t> correct, std::type_identity_t<MatView<T>> dlogits) {
  require_shape("correct", correct, logits.rows, logits.cols);
  check_gradient("dlogits", logits, dlogits);
  if (logits.empty()) return T(0);
  const double unit = weight / static_cast<double>(logits.size());
  double loss = 0;
  for (Index t = 0; t < logits.rows; ++t) {
    for (Index e = 0; e < logits.cols; ++e) {
      const double l = logits(t, e), wanted = correct(t, e) != 0 ? 1 : 0;
      loss += wanted > 0 ? math::softplus<double>(-l) : math::softplus<double>(l);
      if (dlogits.data != nullptr) {
        add_product(dlogits(t, e), unit, math::sigmoid<double>(l) - wanted);
      }
    }
  }
  return static_cast<T>(unit * loss);
}

template <class T>
T ranking_loss(std::span<const T> reward, std::span<const std::int64_t> rank, bool log_sigmoid,
               std::type_identity_t<std::span<T>> dreward) {
  require(rank.size() == reward.size() && (dreward.empty() || dreward.size() == reward.size()),
          Errc::shape_mismatch, "rank: expected ", reward.size(), " values, got ", rank.size());
  double pairs = 0, loss = 0;
  const auto each_pair = [&](auto body) {
    for (std::size_t i = 0; i < reward.size(); ++i) {
      for (std::size_t j = i + 1; j < reward.size(); ++j) {
        if (rank[i] != rank[j]) body(rank[i] < rank[j] ? i : j, rank[i] < rank[j] ? j : i);
      }
    }
  };
  each_pair([&](std::size_t winner, std::size_t loser) {
    const double lead = static_cast<double>(reward[winner]) - reward[loser];
    ++pairs;
    loss += log_sigmoid ? math::softplus<double>(-lead) : -lead;
  });
  if (pairs == 0) return T(0);
  if (!dreward.empty()) {
    each_pair([&](std::size_t winner, std::size_t loser) {
      const double lead = static_cast<double>(reward[winner]) - reward[loser];
      const double slope = (log_sigmoid ? math::sigmoid<double>(-lead) : 1.0) / pairs;
      dreward[winner] -= static_cast<T>(slope);
      dreward[loser] += static_cast<T>(slope);
    });
  }
  return static_cast<T>(loss / pairs);
}

namespace detail {

/// cos(a, b) and, where they have memory, share · its gradient.
template <class T>
double cosine(std::span<const T> a, std::span<const T> b, double share, std::span<T> da,
              std::span<T> db) noexcept {
  double dot = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    dot = std::fma(static_cast<double>(a[i]), b[i], dot);
    aa = std::fma(static_cast<double>(a[i]), a[i], aa);
    bb = std::fma(static_cast<double>(b[i]), b[i], bb);
  }
  const double size = std::sqrt(aa) * std::sqrt(bb);
  if (size == 0) return 0;
  const double cosine = dot / size;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!da.empty()) add_product(da[i], share, std::fma(-cosine, a[i] / aa, b[i] / size));
    if (!db.empty()) add_product(db[i], share, std::fma(-cosine, b[i] / bb, a[i] / size));
  }
  return cosine;
}

}  // namespace detail

template <class T>
T triplet_loss(std::type_identity_t<T> margin, MatView<const T> anchor,
               std::type_identity_t<MatView<const T>> positive,
               std::type_identity_t<MatView<const T>> negative,
               std::type_identity_t<MatView<T>> danchor, std::type_identity_t<MatView<T>> dpositive,
               std::type_identity_t<MatView<T>> dnegative) {
  require_shape("positive", positive, anchor.rows, anchor.cols);
  require_shape("negative", negative, anchor.rows, anchor.cols);
  check_gradient("danchor", anchor, danchor);
  check_gradient("dpositive", anchor, dpositive);
  check_gradient("dnegative", anchor, dnegative);
  const auto row = [](MatView<T> gradient, Index b) {
    return gradient.data != nullptr ? gradient.row(b) : std::span<T>();
  };
  const double unit = anchor.rows > 0 ? 1.0 / static_cast<double>(anchor.rows) : 0.0;
  double loss = 0;
  for (Index b = 0; b < anchor.rows; ++b) {
    const double near = detail::cosine<T>(anchor.row(b), positive.row(b), 0, {}, {});
    const double far = detail::cosine<T>(anchor.row(b), negative.row(b), 0, {}, {});
    const double gap = far - near + margin;
    if (!(gap > 0)) continue;
    loss += gap;
    detail::cosine<T>(anchor.row(b), positive.row(b), -unit, row(danchor, b), row(dpositive, b));
    detail::cosine<T>(anchor.row(b), negative.row(b), unit, row(danchor, b), row(dnegative, b));
  }
  return static_cast<T>(unit * loss);
}

#ifndef MOLE_HEADER_ONLY
extern template float domain_loss(float, MatView<const float>, std::span<const std::int32_t>,
                                  MatView<float>, const Context&);
extern template double domain_loss(double, MatView<const double>, std::span<const std::int32_t>,
                                   MatView<double>, const Context&);
extern template float correctness_loss(float, MatView<const float>, MatView<const std::uint8_t>,
                                       MatView<float>);
extern template double correctness_loss(double, MatView<const double>, MatView<const std::uint8_t>,
                                        MatView<double>);
extern template float ranking_loss(std::span<const float>, std::span<const std::int64_t>, bool,
                                   std::span<float>);
extern template double ranking_loss(std::span<const double>, std::span<const std::int64_t>, bool,
                                    std::span<double>);
extern template float triplet_loss(float, MatView<const float>, MatView<const float>,
                                   MatView<const float>, MatView<float>, MatView<float>,
                                   MatView<float>);
extern template double triplet_loss(double, MatView<const double>, MatView<const double>,
                                    MatView<const double>, MatView<double>, MatView<double>,
                                    MatView<double>);
#endif

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// Slow, obvious twins of the routing code: plain loops in double, no shortcut.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "support/matrix.hpp"

namespace test::reference {

using Row = std::vector<double>;

inline Row row_of(const Matrix<double>& m, Index r) {
  Row row;
  for (Index c = 0; c < m.cols(); ++c) row.push_back(m(r, c));
  return row;
}

/// x weightᵀ + bias; an empty bias is none.
inline Matrix<double> logits(const Matrix<double>& x, const Matrix<double>& weight,
                             const Row& bias) {
  return Matrix<double>(x.rows(), weight.rows(), [&](Index t, Index e) {
    double sum = 0;
    for (Index i = 0; i < x.cols(); ++i) sum += x(t, i) * weight(e, i);
    return bias.empty() ? sum : sum + bias[e];
  });
}

inline Row softmax(const Row& u) {
  const double largest = *std::max_element(u.begin(), u.end());
  double sum = 0;
  for (const double value : u) sum += std::exp(value - largest);
  Row p;
  for (const double value : u) p.push_back(std::exp(value - largest) / sum);
  return p;
}

enum class Score { softmax, sigmoid, sqrt_softplus };

inline Row score(Score kind, const Row& u) {
  if (kind == Score::softmax) return softmax(u);
  Row s;
  for (const double value : u) {
    s.push_back(kind == Score::sigmoid ? 1 / (1 + std::exp(-value))
                                       : std::sqrt(std::log1p(std::exp(value))));
  }
  return s;
}

/// The k largest keys in descending order, the lower index first among equals.
inline std::vector<std::int32_t> top_k(const Row& key, std::size_t k) {
  std::vector<std::int32_t> order(key.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return key[a] > key[b]; });
  order.resize(k);
  return order;
}

/// The steps of a top-k router on the logits of one token.
struct TopK {
  std::size_t k = 2;
  Score kind = Score::softmax;
  bool score_first = true;
  bool renormalise = true;
  double epsilon = 0, temperature = 1, scale = 1;
  Row selection_bias = {};

  Row scaled(const Row& l) const {
    Row u;
    for (const double value : l) u.push_back(value / temperature);
    return u;
  }

  std::vector<std::int32_t> select(const Row& l) const {
    Row key = score_first ? score(kind, scaled(l)) : scaled(l);
    for (std::size_t e = 0; e < selection_bias.size(); ++e) key[e] += selection_bias[e];
    return top_k(key, k);
  }

  /// Gates over all experts, 0 outside `chosen`.
  Row gates(const Row& l, const std::vector<std::int32_t>& chosen) const {
    const Row u = scaled(l), all = score(kind, u);
    Row kept;
    for (const std::int32_t e : chosen) kept.push_back(u[e]);
    const Row over_kept = softmax(kept);
    Row g(l.size(), 0.0);
    double sum = epsilon;
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      const bool after = kind == Score::softmax && !score_first;
      g[chosen[i]] = after ? over_kept[i] : all[chosen[i]];
      sum += g[chosen[i]];
    }
    for (double& value : g) value *= renormalise ? scale / sum : scale;
    return g;
  }
};

/// E Σ_e f_e P_e over the rows with mask; selected [tokens, experts] is 1 or 0.
inline double balance(const Matrix<double>& prob, const Matrix<double>& selected,
                      const std::vector<std::uint8_t>& mask, bool per_token) {
  double tokens = 0, slots = 0, value = 0;
  for (Index t = 0; t < prob.rows(); ++t) {
    tokens += mask[t];
    for (Index e = 0; e < prob.cols(); ++e) slots += mask[t] * selected(t, e);
  }
  for (Index e = 0; e < prob.cols(); ++e) {
    double n = 0, p = 0;
    for (Index t = 0; t < prob.rows(); ++t) {
      n += mask[t] * selected(t, e);
      p += mask[t] * prob(t, e);
    }
    value += n / (per_token ? tokens : slots) * p / tokens;
  }
  return static_cast<double>(prob.cols()) * value;
}

}  // namespace test::reference

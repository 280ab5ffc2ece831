// SPDX-License-Identifier: Apache-2.0
// Pulls every prototype to the mean of the tokens it gets, and away from the others' means.
//
//   m_i = mean of x_t over the tokens that expert i has     C_ij = cos(p_i, m_j)
//   loss = weight · (-1/n) Σ_i ln softmax_j(C_ij / temperature)_i
//
// over the n experts that have a token; with fewer than two of them it is 0. The gradient goes to
// the prototypes and into x. By sequence: the mean over the sequences in which an expert has a
// token. Experts without a prototype, as the unconditional one, do not take part, nor do their
// tokens. Every slot counts, whatever its gate: this is for a routing without probes.
//
// Wei et al., "Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing
// Guidance", 2025 (ProMoE).
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
#include "mole/kernels/math.hpp"
#include "mole/losses/add_product.hpp"
#include "mole/losses/token_mask.hpp"
#include "mole/losses/unit_row.hpp"
#include "mole/routing/routing.hpp"
#include "mole/routing/score.hpp"

namespace mole::inline MOLE_ABI {

struct RoutingContrast {
  double weight = 1;
  double temperature = 0.07;
  bool first_only = false;  ///< a token counts for the expert with its largest gate alone
  std::span<const std::int32_t> sequence_begin =
      {};  ///< [sequences + 1]; empty: all tokens at once
};

/// x [tokens, width], prototypes [at most experts, width]: of the first experts of the routing. dx
/// and dprototypes likewise, or empty. Throws shape_mismatch or invalid_argument.
template <class T>
T routing_contrastive_loss(const RoutingContrast& loss, MatView<const T> x,
                           const Routing<T>& routing,
                           std::type_identity_t<MatView<const T>> prototypes,
                           std::type_identity_t<MatView<T>> dx,
                           std::type_identity_t<MatView<T>> dprototypes, const Context& context);

namespace detail {

/// The contrast of the tokens of one sequence.
template <class T>
class Contrast {
 public:
  Contrast(const RoutingContrast& loss, MatView<const T> x, const Routing<T>& routing,
           MatView<const T> prototypes, const Context& context)
      : loss_(loss),
        x_(x),
        routing_(routing),
        prototypes_(prototypes),
        experts_(prototypes.rows),
        p_(context.scratch.take<double>(experts_, x.cols)),
        m_(context.scratch.take<double>(experts_, x.cols)),
        dm_(context.scratch.take<double>(experts_, x.cols)),
        cosine_(context.scratch.take<double>(experts_, experts_)),
        p_norm_(context.scratch.take<double>(experts_)),
        m_norm_(context.scratch.take<double>(experts_)),
        count_(context.scratch.take<double>(experts_)) {
    for (Index i = 0; i < experts_; ++i) {
      std::ranges::copy(prototypes.row(i), p_.row(i).begin());
      p_norm_[i] = normalise_row(p_.row(i));
    }
  }

  /// How many experts have a token of begin ... end - 1.
  Index gather(Index begin, Index end) {
    std::fill_n(m_.data, m_.size(), 0.0);
    std::fill(count_.begin(), count_.end(), 0.0);
    for (Index t = begin; t < end; ++t) {
      for_each_expert(t, [&](Index e) {
        ++count_[e];
        for (Index c = 0; c < x_.cols; ++c) m_(e, c) += static_cast<double>(x_(t, c));
      });
    }
    Index active = 0;
    for (Index e = 0; e < experts_; ++e) {
      if (count_[e] == 0) continue;
      ++active;
      for (double& v : m_.row(e)) v /= count_[e];
      m_norm_[e] = normalise_row(m_.row(e));
    }
    return active;
  }

  /// Of what was gathered; leaves weight · d loss / d C in place of C.
  double value(Index active, double weight) {
    double loss = 0;
    for (Index i = 0; i < experts_; ++i) {
      if (count_[i] == 0) continue;
      const std::span<double> row = cosine_.row(i);
      double largest = -1 / loss_.temperature, sum = 0;
      for_each_active([&](Index j) {
        double dot = 0;
        for (Index c = 0; c < x_.cols; ++c) dot = std::fma(p_(i, c), m_(j, c), dot);
        row[j] = dot / loss_.temperature;
        largest = std::max(largest, row[j]);
      });
      for_each_active([&](Index j) { sum += math::exp<double>(row[j] - largest); });
      loss += largest + math::log<double>(sum) - row[i];
      const double unit = weight / (static_cast<double>(active) * loss_.temperature);
      for_each_active([&](Index j) {
        const double share = math::exp<double>(row[j] - largest) / sum;
        row[j] = unit * (j == i ? share - 1 : share);
      });
    }
    return weight * loss / static_cast<double>(active);
  }

  void add_gradients(Index begin, Index end, MatView<T> dx, MatView<T> dprototypes) {
    for (Index i = 0; i < experts_ && dprototypes.data != nullptr; ++i) {
      if (count_[i] == 0) continue;
      const std::span<double> d = dm_.row(0);
      std::ranges::fill(d, 0.0);
      for_each_active([&](Index j) { add_row(cosine_(i, j), m_.row(j), d); });
      normalise_row_backward(p_.row(i), p_norm_[i], d);
      for (Index c = 0; c < x_.cols; ++c) dprototypes(i, c) += static_cast<T>(d[c]);
    }
    if (dx.data == nullptr) return;
    for_each_active([&](Index j) {
      std::ranges::fill(dm_.row(j), 0.0);
      for_each_active([&](Index i) { add_row(cosine_(i, j), p_.row(i), dm_.row(j)); });
      normalise_row_backward(m_.row(j), m_norm_[j], dm_.row(j));
    });
    for (Index t = begin; t < end; ++t) {
      for_each_expert(t, [&](Index e) {
        for (Index c = 0; c < x_.cols; ++c) add_product(dx(t, c), 1 / count_[e], dm_(e, c));
      });
    }
  }

 private:
  template <class F>
  void for_each_active(F f) {
    for (Index e = 0; e < experts_; ++e) {
      if (count_[e] != 0) f(e);
    }
  }
  template <class F>
  void for_each_expert(Index t, F f) {
    Index best = -1;
    for (Index s = routing_.token_begin[t]; s < routing_.token_begin[t + 1]; ++s) {
      if (routing_.expert[s] >= experts_) continue;
      if (!loss_.first_only) f(routing_.expert[s]);
      if (best < 0 || routing_.gate[s] > routing_.gate[best]) best = s;
    }
    if (loss_.first_only && best >= 0) f(routing_.expert[best]);
  }

  const RoutingContrast& loss_;
  MatView<const T> x_;
  const Routing<T>& routing_;
  MatView<const T> prototypes_;
  Index experts_;
  MatView<double> p_, m_, dm_, cosine_;
  std::span<double> p_norm_, m_norm_, count_;
};

}  // namespace detail

template <class T>
T routing_contrastive_loss(const RoutingContrast& loss, MatView<const T> x,
                           const Routing<T>& routing,
                           std::type_identity_t<MatView<const T>> prototypes,
                           std::type_identity_t<MatView<T>> dx,
                           std::type_identity_t<MatView<T>> dprototypes, const Context& context) {
  const auto begin = loss.sequence_begin;
  require(x.rows == routing.tokens, Errc::shape_mismatch, "x: expected ", routing.tokens,
          " rows, got ", x.rows);
  require(prototypes.rows <= routing.experts, Errc::shape_mismatch, "prototypes: expected at most ",
          routing.experts, " rows, got ", prototypes.rows);
  require_shape("prototypes", prototypes, prototypes.rows, x.cols);
  check_gradient("dx", x, dx);
  check_gradient("dprototypes", prototypes, dprototypes);
  require(begin.empty() || (begin.front() == 0 && begin.back() == x.rows &&
                            std::is_sorted(begin.begin(), begin.end())),
          Errc::invalid_argument, "sequence_begin: expected to ascend from 0 to ", x.rows);
  require(loss.temperature > 0, Errc::invalid_argument,
          "temperature: expected a positive number, got ", loss.temperature);
  const Workspace::Frame frame(context.scratch);
  detail::Contrast<T> contrast(loss, x, routing, prototypes, context);
  const std::int32_t all[] = {0, static_cast<std::int32_t>(x.rows)};
  const auto bounds = begin.size() < 2 ? std::span<const std::int32_t>(all) : begin;
  double groups = 0, value = 0;
  for (std::size_t s = 0; s + 1 < bounds.size(); ++s) {
    groups += contrast.gather(bounds[s], bounds[s + 1]) > 0;
  }
  for (std::size_t s = 0; s + 1 < bounds.size(); ++s) {
    const Index active = contrast.gather(bounds[s], bounds[s + 1]);
    if (active < 2) continue;
    value += contrast.value(active, loss.weight / groups);
    contrast.add_gradients(bounds[s], bounds[s + 1], dx, dprototypes);
  }
  return static_cast<T>(value);
}

#ifndef MOLE_HEADER_ONLY
extern template float routing_contrastive_loss(const RoutingContrast&, MatView<const float>,
                                               const Routing<float>&, MatView<const float>,
                                               MatView<float>, MatView<float>, const Context&);
extern template double routing_contrastive_loss(const RoutingContrast&, MatView<const double>,
                                                const Routing<double>&, MatView<const double>,
                                                MatView<double>, MatView<double>, const Context&);
#endif

}  // namespace mole::inline MOLE_ABI

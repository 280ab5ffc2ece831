// SPDX-License-Identifier: Apache-2.0
// Fits a linear router without gradients: clusters of contexts, each with the expert that serves it
// best.
//
//   1  k-means of the contexts with one centre an expert: nearest by mean |·|, ties to the lower
//      centre, at most max_iterations; it has converged once no centre moves by more than
//      tolerance_abs + tolerance_rel · |the old one|
//   2  L_je = median over the members of cluster j of the loss of expert e, NaN being infinite
//   3  clusters in order: each takes the expert with the smallest L_je that is left
//   4  [W, b] = argmin ‖[ξ + noise, 1] [W, b]ᵀ - Y‖, Y one-hot of the expert, the shortest solution
//
// A cluster without members, convergence in the last iteration and none at all fit nothing: the
// router stays, and the centres are 0, to be drawn anew. The members are those by the centres
// before their last move.
//
// Nzoyem et al., "MixER: Better Mixture of Experts Routing for Hierarchical Meta-Learning", 2025.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "mole/algebra/least_squares.hpp"
#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/routing/linear.hpp"

namespace mole::inline MOLE_ABI {

struct RouterFit {
  Index max_iterations = 20;
  double tolerance_abs = 1e-4, tolerance_rel = 1e-5;
  double noise_level = 1e-4;  ///< of the noise on the contexts
};

/// What a fit reads. n environments, c entries of a context.
template <class T>
struct RouterFitInput {
  MatView<const T> contexts;    ///< [n, c]
  MatView<const T> losses;      ///< [n, experts], of every expert on every environment
  MatView<const T> noise = {};  ///< [n, c], standard normal, or empty
};

/// What a fit found out, in the caller's memory. Without an update: -1 and 0.
template <class T>
struct RouterFitDetails {
  std::span<std::int32_t> cluster;  ///< [n], of every environment
  std::span<std::int32_t> expert;   ///< [experts], of every cluster
  MatView<T> loss;                  ///< [experts, experts], L
  MatView<T> target;                ///< [n, experts], Y
};

struct RouterFitResult {
  bool updated = false;
  Index iterations = 0;  ///< begun
};

/// Scratch of a fit of so many environments, entries of a context and experts.
inline std::size_t fit_router_bytes(Index environments, Index width, Index experts) noexcept;

/// centres [experts, c] are read and written; the router's weight [experts, c] and bias, if it has
/// one, are written if there is an update. Throws shape_mismatch; invalid_argument without experts;
/// out_of_memory. Then nothing has been written.
template <class T>
RouterFitResult fit_router(const RouterFit& how, const RouterFitInput<T>& input, MatView<T> centres,
                           const LinearParams<T>& router, const RouterFitDetails<T>& details,
                           const Context& context);

namespace detail {

/// All memory of a fit. cols: the context's entries, and 1 of a bias.
struct RouterFitScratch {
  MatView<double> centre, next;  // [experts, width]
  std::span<double> size;        // [experts]
  std::span<double> losses;      // [n], of one expert on one cluster
  MatView<double> x, y, w;       // [cols, n], [n, experts], [cols, experts]: x w = y
  MatView<double> turns;         // [cols, cols]

  template <class Arena>
  static RouterFitScratch take(Arena& arena, Index count, Index width, Index experts, Index cols) {
    RouterFitScratch scratch;
    scratch.centre = arena.template take<double>(experts, width);
    scratch.next = arena.template take<double>(experts, width);
    scratch.size = arena.template take<double>(experts);
    scratch.losses = arena.template take<double>(count);
    scratch.x = arena.template take<double>(cols, count);
    scratch.y = arena.template take<double>(count, experts);
    scratch.w = arena.template take<double>(cols, experts);
    scratch.turns = arena.template take<double>(cols, cols);
    return scratch;
  }
};

template <class T>
class Clusters {
 public:
  Clusters(MatView<const T> contexts, MatView<const T> centres, std::span<std::int32_t> of,
           const RouterFitScratch& scratch) noexcept
      : contexts_(contexts),
        of_(of),
        centre_(scratch.centre),
        next_(scratch.next),
        size_(scratch.size) {
    for (Index e = 0; e < centres.rows; ++e)
      std::ranges::copy(centres.row(e), centre_.row(e).begin());
  }

  /// Whether it converged before the last iteration allowed.
  bool run(const RouterFit& how, Index& iterations) {
    for (iterations = 0; iterations < how.max_iterations;) {
      ++iterations;
      if (!assign()) return false;
      if (move(how)) return iterations < how.max_iterations;
    }
    return false;
  }
  double centre(Index e, Index i) const noexcept { return centre_(e, i); }

 private:
  /// False if a cluster is empty.
  bool assign() noexcept {
    std::ranges::fill(size_, 0.0);
    for (Index e = 0; e < next_.rows; ++e) std::ranges::fill(next_.row(e), 0.0);
    for (Index t = 0; t < contexts_.rows; ++t) {
      double best = std::numeric_limits<double>::infinity();
      of_[t] = 0;
      for (Index e = 0; e < centre_.rows; ++e) {
        double distance = 0;
        for (Index i = 0; i < contexts_.cols; ++i) {
          distance += std::abs(static_cast<double>(contexts_(t, i)) - centre_(e, i));
        }
        if (distance < best) {
          best = distance;
          of_[t] = static_cast<std::int32_t>(e);
        }
      }
      ++size_[of_[t]];
      for (Index i = 0; i < contexts_.cols; ++i) {
        next_(of_[t], i) += static_cast<double>(contexts_(t, i));
      }
    }
    return std::ranges::find(size_, 0.0) == size_.end();
  }
  /// True if every centre stays, within the tolerance.
  bool move(const RouterFit& how) noexcept {
    bool stays = true;
    for (Index e = 0; e < centre_.rows; ++e) {
      for (Index i = 0; i < centre_.cols; ++i) {
        const double old = centre_(e, i), now = next_(e, i) / size_[e];
        const double allowed = std::fma(how.tolerance_rel, std::abs(old), how.tolerance_abs);
        stays = stays && std::abs(now - old) <= allowed;
        centre_(e, i) = now;
      }
    }
    return stays;
  }

  MatView<const T> contexts_;
  std::span<std::int32_t> of_;
  MatView<double> centre_, next_;
  std::span<double> size_;
};

/// Median losses of every expert on every cluster. `work` [n].
template <class T>
void cluster_losses(MatView<const T> losses, std::span<const std::int32_t> cluster, MatView<T> loss,
                    std::span<double> work) noexcept {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (Index j = 0; j < loss.rows; ++j) {
    for (Index e = 0; e < loss.cols; ++e) {
      std::size_t count = 0;
      for (std::size_t t = 0; t < cluster.size(); ++t) {
        if (cluster[t] != j) continue;
        const auto value = static_cast<double>(losses(static_cast<Index>(t), e));
        work[count++] = std::isnan(value) ? kInfinity : value;
      }
      std::sort(work.begin(), work.begin() + static_cast<std::ptrdiff_t>(count));
      const T low = static_cast<T>(work[(count - 1) / 2]), high = static_cast<T>(work[count / 2]);
      loss(j, e) = std::isinf(low) ? low : low + (high - low) / T(2);
    }
  }
}

/// Every cluster, in order, takes the expert with the smallest loss that is left.
template <class T>
void match_clusters(MatView<const T> loss, std::span<std::int32_t> expert) noexcept {
  for (std::size_t j = 0; j < expert.size(); ++j) {
    std::int32_t best = -1;
    for (std::int32_t e = 0; e < static_cast<std::int32_t>(expert.size()); ++e) {
      const auto end = expert.begin() + static_cast<std::ptrdiff_t>(j);
      if (std::find(expert.begin(), end, e) != end) continue;
      const auto row = static_cast<Index>(j);
      if (best < 0 || loss(row, e) < loss(row, best)) best = e;
    }
    expert[j] = best;
  }
}

template <class T>
void fit_head(const RouterFit& how, const RouterFitInput<T>& input, MatView<const T> target,
              const LinearParams<T>& router, const RouterFitScratch& scratch) noexcept {
  const MatView<double>&x = scratch.x, &w = scratch.w;
  const Index cols = x.rows, width = input.contexts.cols;
  for (Index t = 0; t < x.cols; ++t) {
    for (Index i = 0; i < cols; ++i) {
      const double noise = input.noise.data != nullptr && i < width ? input.noise(t, i) : T(0);
      x(i, t) = i < width ? std::fma(how.noise_level, noise, double(input.contexts(t, i))) : 1;
    }
    std::ranges::copy(target.row(t), scratch.y.row(t).begin());
  }
  least_squares(x, scratch.y, w, scratch.turns);
  for (Index e = 0; e < w.cols; ++e) {
    for (Index i = 0; i < width; ++i) router.weight(e, i) = static_cast<T>(w(i, e));
    if (cols > width) router.bias(0, e) = static_cast<T>(w(width, e));
  }
}

template <class T>
void check_fit(const RouterFitInput<T>& input, MatView<T> centres, const LinearParams<T>& router,
               const RouterFitDetails<T>& details) {
  const Index count = input.contexts.rows, width = input.contexts.cols, experts = centres.rows;
  require(experts >= 1, Errc::invalid_argument, "centres: expected at least one, got ", experts);
  require_shape("contexts", input.contexts, count, width);
  require_shape("losses", input.losses, count, experts);
  if (input.noise.data != nullptr) require_shape("noise", input.noise, count, width);
  require_shape("centres", centres, experts, width);
  require_shape("weight", router.weight, experts, width);
  if (router.bias.data != nullptr) require_shape("bias", router.bias, 1, experts);
  require(static_cast<Index>(details.cluster.size()) == count &&
              static_cast<Index>(details.expert.size()) == experts,
          Errc::shape_mismatch, "details: expected ", count, " clusters and ", experts,
          " experts, got ", details.cluster.size(), " and ", details.expert.size());
  require_shape("details.loss", details.loss, experts, experts);
  require_shape("details.target", details.target, count, experts);
}

}  // namespace detail

inline std::size_t fit_router_bytes(Index environments, Index width, Index experts) noexcept {
  ByteCounter counter;
  detail::RouterFitScratch::take(counter, environments, width, experts, width + 1);
  return counter.bytes();
}

template <class T>
RouterFitResult fit_router(const RouterFit& how, const RouterFitInput<T>& input, MatView<T> centres,
                           const LinearParams<T>& router, const RouterFitDetails<T>& details,
                           const Context& context) {
  detail::check_fit(input, centres, router, details);
  const Workspace::Frame frame(context.scratch);
  const Index width = input.contexts.cols, cols = width + (router.bias.data != nullptr ? 1 : 0);
  const auto scratch = detail::RouterFitScratch::take(context.scratch, input.contexts.rows, width,
                                                      centres.rows, cols);
  detail::Clusters<T> clusters(input.contexts, centres, details.cluster, scratch);
  RouterFitResult result;
  result.updated = clusters.run(how, result.iterations);
  for (Index e = 0; e < centres.rows; ++e) {
    for (Index i = 0; i < centres.cols; ++i) {
      centres(e, i) = result.updated ? static_cast<T>(clusters.centre(e, i)) : T(0);
    }
    std::ranges::fill(details.loss.row(e), T(0));
  }
  for (Index t = 0; t < input.contexts.rows; ++t) std::ranges::fill(details.target.row(t), T(0));
  std::ranges::fill(details.expert, -1);
  if (!result.updated) {
    std::ranges::fill(details.cluster, -1);
    return result;
  }
  detail::cluster_losses<T>(input.losses, details.cluster, details.loss, scratch.losses);
  detail::match_clusters<T>(details.loss, details.expert);
  for (Index t = 0; t < input.contexts.rows; ++t) {
    details.target(t, details.expert[details.cluster[t]]) = T(1);
  }
  detail::fit_head<T>(how, input, details.target, router, scratch);
  return result;
}

#ifndef MOLE_HEADER_ONLY
extern template RouterFitResult fit_router(const RouterFit&, const RouterFitInput<float>&,
                                           MatView<float>, const LinearParams<float>&,
                                           const RouterFitDetails<float>&, const Context&);
extern template RouterFitResult fit_router(const RouterFit&, const RouterFitInput<double>&,
                                           MatView<double>, const LinearParams<double>&,
                                           const RouterFitDetails<double>&, const Context&);
#endif

}  // namespace mole::inline MOLE_ABI

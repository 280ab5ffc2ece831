// SPDX-License-Identifier: Apache-2.0
// Losses on the prototypes of the experts: directions apart, lengths short.
//
//   diversity_loss    weight · ‖P̂ P̂ᵀ - I‖      P̂: the rows of P over their norms, or P itself
//   simplicity_loss   weight · mean_e ‖p_e‖
//
// P [experts, width], ‖·‖ the root of the sum of squares. Experts with mask 0 take no part. A
// prototype of zeros has no direction: it adds 1 to the sum of squares and has no gradient, by
// either loss. Where the diversity loss is 0 it has a corner; its gradient there is 0.
//
// Guo et al., "Dynamic Mixture of Experts: An Auto-Tuning Approach for Efficient Transformer
// Models", 2024 (DynMoE), adds up both, with TopAnyRouter. The paper has P itself in the product,
// and ‖·‖₂; the released code has the cosines, as the router has, and the root of the sum of
// squares, which is what is here by default. Its mean of the norms counts the rows of experts that
// are masked out too; here they are left out of both.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/losses/add_product.hpp"
#include "mole/losses/token_mask.hpp"
#include "mole/losses/unit_row.hpp"

namespace mole::inline MOLE_ABI {

struct DiversityLoss {
  double weight = 1;
  bool of_directions = true;  ///< P̂; false: P as it is
};

/// prototypes [experts, width]; dprototypes likewise, or empty. mask: 1 = the expert takes part.
/// Throws shape_mismatch.
template <class T>
T diversity_loss(const DiversityLoss& loss, MatView<const T> prototypes,
                 std::type_identity_t<MatView<T>> dprototypes, const Context& context,
                 const TokenMask& mask = {});

/// The same arguments.
template <class T>
T simplicity_loss(std::type_identity_t<T> weight, MatView<const T> prototypes,
                  std::type_identity_t<MatView<T>> dprototypes, const Context& context,
                  const TokenMask& mask = {});

template <class T>
T diversity_loss(const DiversityLoss& loss, MatView<const T> prototypes,
                 std::type_identity_t<MatView<T>> dprototypes, const Context& context,
                 const TokenMask& mask) {
  const Index experts = prototypes.rows, width = prototypes.cols;
  mask.check(experts);
  check_gradient("dprototypes", prototypes, dprototypes);
  const Workspace::Frame frame(context.scratch);
  const auto rows = context.scratch.take<double>(experts, width);
  const auto excess = context.scratch.take<double>(experts, experts);  // rows rowsᵀ - I
  const auto norm = context.scratch.take<double>(experts), d = context.scratch.take<double>(width);
  const auto each = [&](auto body) {
    for (Index e = 0; e < experts; ++e) {
      if (mask.is_real(e)) body(e);
    }
  };
  each([&](Index e) {
    std::ranges::copy(prototypes.row(e), rows.row(e).begin());
    norm[e] = loss.of_directions ? detail::normalise_row(rows.row(e)) : 1;
  });
  double squares = 0;
  each([&](Index i) {
    each([&](Index j) {
      double dot = i == j ? -1 : 0;
      for (Index c = 0; c < width; ++c) dot = std::fma(rows(i, c), rows(j, c), dot);
      excess(i, j) = dot;
      squares = std::fma(dot, dot, squares);
    });
  });
  const double size = std::sqrt(squares);
  if (dprototypes.data == nullptr || size == 0) return static_cast<T>(loss.weight * size);
  each([&](Index i) {
    std::ranges::fill(d, 0.0);
    each([&](Index j) { detail::add_row(2 * loss.weight * excess(i, j) / size, rows.row(j), d); });
    if (loss.of_directions) detail::normalise_row_backward(rows.row(i), norm[i], d);
    for (Index c = 0; c < width; ++c) dprototypes(i, c) += static_cast<T>(d[c]);
  });
  return static_cast<T>(loss.weight * size);
}

template <class T>
T simplicity_loss(std::type_identity_t<T> weight, MatView<const T> prototypes,
                  std::type_identity_t<MatView<T>> dprototypes, const Context& context,
                  const TokenMask& mask) {
  mask.check(prototypes.rows);
  check_gradient("dprototypes", prototypes, dprototypes);
  const double experts = mask.count(prototypes.rows);
  if (experts == 0) return T(0);
  const Workspace::Frame frame(context.scratch);
  const auto row = context.scratch.take<double>(prototypes.cols);
  const double unit = static_cast<double>(weight) / experts;
  double sum = 0;
  for (Index e = 0; e < prototypes.rows; ++e) {
    if (!mask.is_real(e)) continue;
    std::ranges::copy(prototypes.row(e), row.begin());
    const double norm = detail::row_norm(row);
    sum += norm;
    if (dprototypes.data == nullptr || norm == 0) continue;
    for (Index c = 0; c < prototypes.cols; ++c) {
      add_product(dprototypes(e, c), unit, row[c] / norm);
    }
  }
  return static_cast<T>(unit * sum);
}

#ifndef MOLE_HEADER_ONLY
extern template float diversity_loss(const DiversityLoss&, MatView<const float>, MatView<float>,
                                     const Context&, const TokenMask&);
extern template double diversity_loss(const DiversityLoss&, MatView<const double>, MatView<double>,
                                      const Context&, const TokenMask&);
extern template float simplicity_loss(float, MatView<const float>, MatView<float>, const Context&,
                                      const TokenMask&);
extern template double simplicity_loss(double, MatView<const double>, MatView<double>,
                                       const Context&, const TokenMask&);
#endif

}  // namespace mole::inline MOLE_ABI

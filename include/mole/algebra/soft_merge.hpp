// SPDX-License-Identifier: Apache-2.0
// One expert out of many, by averaging their parameters.
//
//   A = Σ_e g_e A_e     B = Σ_e g_e s_e B_e     β = Σ_e g_e s_e β_e     the merged scale is 1
//
//   A_e = down [rank, in]   B_e = up [out, rank]   β_e = bias [1, out], all of one rank
//
// An expert with the gate 0 does not touch the sums, whatever its parameters hold.
//
// The merged expert costs as much as one, for a whole sequence with the gates of that sequence. It
// is another function than the routed sum of outputs: B A has the products B_i A_j of different
// experts in it. To average the updates B_e A_e themselves, route with the same gates.
//
// Muqeeth et al., "Soft Merging of Experts with Adaptive Routing", 2023 (SMEAR); with gates of
// tasks, the soft merging of "MoV / MoLORA", Zadouri et al., 2023, on LoRA.
#pragma once

#include <cmath>
#include <span>
#include <string_view>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/kernels/rows.hpp"

namespace mole::inline MOLE_ABI {

/// Memory of one merged expert, or of its gradient. `bias` is empty if the experts have none.
template <class V>
struct MergedExpert {
  MatView<V> down;  ///< [rank, in]
  MatView<V> up;    ///< [out, rank]
  MatView<V> bias = {};
};

namespace detail {

template <class V, class W>
void check_soft_merge(std::size_t gates, std::size_t scales, const LoraBankParams<V>& experts,
                      const MergedExpert<W>& merged) {
  require(gates == experts.rank.size(), Errc::shape_mismatch, "gates: expected ",
          experts.rank.size(), " values, got ", gates);
  require(scales == experts.rank.size(), Errc::shape_mismatch, "scale: expected ",
          experts.rank.size(), " values, got ", scales);
  require(!experts.rank.empty(), Errc::invalid_argument, "experts: expected at least one");
  const Index rank = experts.rank.front();
  for (std::size_t e = 0; e < experts.rank.size(); ++e) {
    require(experts.rank[e] == rank, Errc::shape_mismatch, "experts: expected the rank ", rank,
            " of the first one, expert ", e, " has ", experts.rank[e]);
  }
  const Index biases = experts.bias.empty() ? 0 : 1, bias_width = biases * experts.out;
  for (Index e = 0; e < static_cast<Index>(experts.rank.size()); ++e) {
    require_shape("experts.down", experts.down_of(e), rank, experts.in);
    require_shape("experts.up", experts.up_of(e), experts.out, rank);
    require_shape("experts.bias", experts.bias_of(e), biases, bias_width);
  }
  require_shape("down", merged.down, rank, experts.in);
  require_shape("up", merged.up, experts.out, rank);
  require_shape("bias", merged.bias, biases, bias_width);
}

/// Gradients of the experts, each where it has memory.
template <class T>
void check_soft_merge_gradient(const LoraBankParams<T>& grad, Index experts,
                               const MergedExpert<const T>& like) {
  const auto check = [](std::string_view name, MatView<T> found, MatView<const T> wanted) {
    if (found.data != nullptr) require_shape(name, found, wanted.rows, wanted.cols);
  };
  for (Index e = 0; e < experts; ++e) {
    check("grad.down", grad.down_of(e), like.down);
    check("grad.up", grad.up_of(e), like.up);
    check("grad.bias", grad.bias_of(e), like.bias);
  }
}

template <class V, class W>
double inner_product(MatView<V> a, MatView<W> b) {
  double sum = 0;
  for (Index r = 0; r < a.rows; ++r) {
    for (Index c = 0; c < a.cols; ++c) {
      sum = std::fma(static_cast<double>(a(r, c)), static_cast<double>(b(r, c)), sum);
    }
  }
  return sum;
}

}  // namespace detail

/// Writes `merged`; every element is one chain over the experts, ascending. gates, scale
/// [experts]. Throws shape_mismatch or invalid_argument, before any write.
template <class T>
void soft_merge(std::span<const T> gates, const LoraBankParams<const T>& experts,
                std::type_identity_t<std::span<const T>> scale, const MergedExpert<T>& merged) {
  detail::check_soft_merge(gates.size(), scale.size(), experts, merged);
  for (const MatView<T> view : {merged.down, merged.up, merged.bias}) rows::fill(view, 0);
  for (std::size_t e = 0; e < gates.size(); ++e) {
    if (gates[e] == T(0)) continue;
    const auto i = static_cast<Index>(e);
    const T scaled = gates[e] * scale[e];
    rows::add<T>(gates[e], experts.down_of(i), merged.down);
    rows::add<T>(scaled, experts.up_of(i), merged.up);
    rows::add<T>(scaled, experts.bias_of(i), merged.bias);
  }
}

/// Adds the gradients that arrive by the merged expert: into dgates [experts] or empty, and into
/// grad, of the experts' shapes, where it has memory; the gate 0 gives its expert no gradient, but
/// has one itself. Throws as soft_merge does.
template <class T>
void soft_merge_backward(std::span<const T> gates, const LoraBankParams<const T>& experts,
                         std::type_identity_t<std::span<const T>> scale,
                         const MergedExpert<const T>& d_merged,
                         std::type_identity_t<std::span<T>> dgates, const LoraBankParams<T>& grad) {
  detail::check_soft_merge(gates.size(), scale.size(), experts, d_merged);
  require(dgates.empty() || dgates.size() == gates.size(), Errc::shape_mismatch,
          "dgates: expected ", gates.size(), " values, got ", dgates.size());
  detail::check_soft_merge_gradient(grad, static_cast<Index>(gates.size()), d_merged);
  const auto add = [](T factor, MatView<const T> from, MatView<T> to) {
    if (to.data != nullptr) rows::add<T>(factor, from, to);
  };
  for (std::size_t e = 0; e < gates.size(); ++e) {
    const auto i = static_cast<Index>(e);
    const T scaled = gates[e] * scale[e];
    if (gates[e] != T(0)) {
      add(gates[e], d_merged.down, grad.down_of(i));
      add(scaled, d_merged.up, grad.up_of(i));
      add(scaled, d_merged.bias, grad.bias_of(i));
    }
    if (dgates.empty()) continue;
    double behind_scale = detail::inner_product(experts.up_of(i), d_merged.up);
    if (!experts.bias.empty()) {
      behind_scale += detail::inner_product(experts.bias_of(i), d_merged.bias);
    }
    dgates[e] += static_cast<T>(std::fma(static_cast<double>(scale[e]), behind_scale,
                                         detail::inner_product(experts.down_of(i), d_merged.down)));
  }
}

}  // namespace mole::inline MOLE_ABI

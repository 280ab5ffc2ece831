// SPDX-License-Identifier: Apache-2.0
// One expert out of many, by averaging their parameters.
//
//   A = Σ_e g_e A_e     B = Σ_e g_e s_e B_e     β = Σ_e g_e s_e β_e     the merged scale is 1
//
//   A_e = down [rank, in]   B_e = up [out, rank]   β_e = bias [1, out], all of one rank
//
// The merged expert costs as much as one, for a whole sequence with the gates of that sequence. It
// is another function than the routed sum of outputs: B A has the products B_i A_j of different
// experts in it. To average the updates B_e A_e themselves, route with the same gates.
//
// Muqeeth et al., "Soft Merging of Experts with Adaptive Routing", 2023 (SMEAR); with gates of
// tasks, the soft merging of "MoV / MoLORA", Zadouri et al., 2023, on LoRA.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/experts/lora_bank.hpp"

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
  require_shape("down", merged.down, rank, experts.in);
  require_shape("up", merged.up, experts.out, rank);
  require_shape("bias", merged.bias, experts.bias.empty() ? 0 : 1,
                experts.bias.empty() ? 0 : experts.out);
}

/// sum += factor · value.
template <class T, class V>
void add_scaled(T factor, MatView<V> value, MatView<T> sum) {
  for (Index r = 0; r < value.rows; ++r) {
    for (Index c = 0; c < value.cols; ++c) sum(r, c) = std::fma(factor, value(r, c), sum(r, c));
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
/// [experts]. Throws shape_mismatch or invalid_argument.
template <class T>
void soft_merge(std::span<const T> gates, const LoraBankParams<const T>& experts,
                std::type_identity_t<std::span<const T>> scale, const MergedExpert<T>& merged) {
  detail::check_soft_merge(gates.size(), scale.size(), experts, merged);
  for (const MatView<T> view : {merged.down, merged.up, merged.bias}) {
    for (Index r = 0; r < view.rows; ++r) std::ranges::fill(view.row(r), T(0));
  }
  for (std::size_t e = 0; e < gates.size(); ++e) {
    const auto i = static_cast<Index>(e);
    const T scaled = gates[e] * scale[e];
    detail::add_scaled<T>(gates[e], experts.down_of(i), merged.down);
    detail::add_scaled<T>(scaled, experts.up_of(i), merged.up);
    if (!experts.bias.empty()) detail::add_scaled<T>(scaled, experts.bias_of(i), merged.bias);
  }
}

/// Adds the gradients that arrive by the merged expert: into dgates [experts] or empty, and into
/// grad where it has memory. Throws as soft_merge does.
template <class T>
void soft_merge_backward(std::span<const T> gates, const LoraBankParams<const T>& experts,
                         std::type_identity_t<std::span<const T>> scale,
                         const MergedExpert<const T>& d_merged,
                         std::type_identity_t<std::span<T>> dgates, const LoraBankParams<T>& grad) {
  detail::check_soft_merge(gates.size(), scale.size(), experts, d_merged);
  require(dgates.empty() || dgates.size() == gates.size(), Errc::shape_mismatch,
          "dgates: expected ", gates.size(), " values, got ", dgates.size());
  for (std::size_t e = 0; e < gates.size(); ++e) {
    const auto i = static_cast<Index>(e);
    const T scaled = gates[e] * scale[e];
    if (grad.down_of(i).data != nullptr) {
      detail::add_scaled<T>(gates[e], d_merged.down, grad.down_of(i));
    }
    if (grad.up_of(i).data != nullptr) {
      detail::add_scaled<T>(scaled, d_merged.up, grad.up_of(i));
    }
    if (grad.bias_of(i).data != nullptr) {
      detail::add_scaled<T>(scaled, d_merged.bias, grad.bias_of(i));
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

// SPDX-License-Identifier: Apache-2.0
// HashRule: the token's id (a token, task, domain or language id) says which experts, instead of
// its content.
//
//   S = row `id` of a table [ids, k], or, without a table, the one expert id mod experts
//   g = 1 / k on S, or, scored, the weights of their scores (weight.hpp)
//
// A token whose id is negative or beyond the table, an expert that is not available and an entry
// that is no expert have no slot; an expert named twice in a row counts once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "mole/core/config.hpp"
#include "mole/routing/rule.hpp"
#include "mole/routing/stages.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct HashRule {
  struct Buffers {
    MatView<const std::int32_t> table = {};  ///< [ids, k], or empty: id mod experts

    /// The table is the host's: it is not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  Index k = 1;
  bool scored = false;
  Weighting<T> weighting;

  static constexpr Index kWorkRows = 1;
  Index max_per_token(Index) const noexcept { return k; }
  void check(const Buffers& buffers, Index tokens, Index experts) const;
  Index forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept;
  void backward(const RuleRow<T>& row, const Buffers& buffers,
                const RuleRowGradient<T>& d) const noexcept;
};

template <class T>
void HashRule<T>::check(const Buffers& buffers, Index, Index experts) const {
  if (buffers.table.data != nullptr) {
    require_shape("table", buffers.table, buffers.table.rows, k);
    return;
  }
  require(k == 1, Errc::invalid_argument, "hash router: without a table k is 1, got ", k, " of ",
          experts, " experts");
}

template <class T>
Index HashRule<T>::forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept {
  const auto experts = static_cast<std::int32_t>(row.logits.size());
  if (scored) {
    stages::score<T>(weighting.score, row.logits, row.prob);
  } else {
    std::fill(row.prob.begin(), row.prob.end(), T(0));
  }
  const bool has_table = buffers.table.data != nullptr;
  if (row.id < 0 || (has_table && row.id >= buffers.table.rows)) return 0;
  Index count = 0;
  for (Index i = 0; i < k; ++i) {
    const std::int32_t e = has_table ? buffers.table(row.id, i) : row.id % experts;
    const auto end = row.chosen.begin() + count;
    if (e < 0 || e >= experts || std::find(row.chosen.begin(), end, e) != end) continue;
    if (row.logits[e] == -std::numeric_limits<T>::infinity()) continue;
    row.chosen[count++] = e;
  }
  if (scored) {
    stages::weigh<T>(weighting, row.logits, row.prob, row.chosen.first(count),
                     row.gate.first(count));
  } else {
    std::fill_n(row.gate.begin(), count, T(1) / static_cast<T>(k));
  }
  return count;
}

template <class T>
void HashRule<T>::backward(const RuleRow<T>& row, const Buffers&,
                           const RuleRowGradient<T>& d) const noexcept {
  if (scored) weighted_scores_backward(weighting, row, d);
}

#ifndef MOLE_HEADER_ONLY
extern template struct HashRule<float>;
extern template struct HashRule<double>;
#endif

}  // namespace mole::inline MOLE_ABI

// SPDX-License-Identifier: Apache-2.0
// Pulls the keys that were looked up towards the queries that found them.
//
//   loss = weight · mean_b Σ_S (1 - l_be)      l: the cosines, S: the experts that b selected
//
// Uni-RAG: x the query, prototypes the keys of a bank; keys that nobody selects do not move.
#pragma once

#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/losses/token_mask.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

/// logits [tokens or more, experts] as the tape of a PrototypeRouter has them; dlogits likewise, or
/// empty. Every slot counts. Throws shape_mismatch.
template <class T>
T pull_loss(std::type_identity_t<T> weight, const Routing<T>& routing,
            std::type_identity_t<MatView<const T>> logits,
            std::type_identity_t<MatView<T>> dlogits) {
  require(logits.rows >= routing.tokens, Errc::shape_mismatch, "logits: expected at least ",
          routing.tokens, " rows, got ", logits.rows);
  require_shape("logits", logits, logits.rows, routing.experts);
  check_gradient("dlogits", logits, dlogits);
  if (routing.tokens == 0) return T(0);
  const double unit = static_cast<double>(weight) / static_cast<double>(routing.tokens);
  double loss = 0;
  for (Index t = 0; t < routing.tokens; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      const Index e = routing.expert[s];
      loss += 1 - static_cast<double>(logits(t, e));
      if (dlogits.data != nullptr) dlogits(t, e) -= static_cast<T>(unit);
    }
  }
  return static_cast<T>(unit * loss);
}

}  // namespace mole::inline MOLE_ABI

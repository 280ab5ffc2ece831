// SPDX-License-Identifier: Apache-2.0
// DynMoLE's router as its golden cases describe it, and the entropy that it and its loss share.
#pragma once

#include <algorithm>
#include <string>

#include "golden/golden.hpp"
#include "mole/routers/tsallis.hpp"

namespace golden {

template <class T>
typename mole::TsallisRouter<T>::Config dynmole_config(Case<T>& c, Index width, Index experts,
                                                       bool bias) {
  const bool tsallis = c.template config<std::string>("entropy_type") == "tsallis";
  return {.width = width,
          .experts = experts,
          .top_p = c.template config<T>("top_p"),
          .keep_top_k = std::min(c.template config<Index>("keep_top_k"), experts),
          .entropy = tsallis ? mole::EntropyKind::tsallis : mole::EntropyKind::renyi,
          .entropy_index = c.template config<T>("entropy_index"),
          .entropy_threshold = c.template config<T>("entropy_threshold"),
          .entropy_epsilon = c.template config<T>("entropy_eps"),
          .bias = bias};
}

template <class T>
mole::Entropy<T> dynmole_entropy(const mole::TsallisRouter<T>& router) {
  const auto& config = router.config();
  return {config.entropy, config.entropy_index, config.entropy_epsilon, true};
}

}  // namespace golden

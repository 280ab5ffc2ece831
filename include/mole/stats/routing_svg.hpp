// SPDX-License-Identifier: Apache-2.0
// A picture of who worked on which token: rows of tokens, one cell per expert below each token, the
// darker the larger its gate.
//
// Needs the compiled library.
#pragma once

#include <span>
#include <string>

#include "mole/core/config.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

struct RoutingSvgOptions {
  std::string title;
  Index tokens_per_row = 16;                     ///< at most; above 0
  std::span<const std::string> row_titles = {};  ///< one per row of tokens, or empty
};

/// The text of an SVG file. `token_text` [tokens] and `expert_names` [experts] may be any UTF-8;
/// white space is made visible. Gates are drawn from 0 (white) to 1. Throws shape_mismatch,
/// invalid_argument.
template <class T>
std::string routing_svg(const Routing<T>& routing, std::span<const std::string> token_text,
                        std::span<const std::string> expert_names,
                        const RoutingSvgOptions& options = {});

extern template std::string routing_svg(const Routing<float>&, std::span<const std::string>,
                                        std::span<const std::string>, const RoutingSvgOptions&);
extern template std::string routing_svg(const Routing<double>&, std::span<const std::string>,
                                        std::span<const std::string>, const RoutingSvgOptions&);

}  // namespace mole::inline MOLE_ABI

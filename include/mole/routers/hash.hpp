// SPDX-License-Identifier: Apache-2.0
// HashRouter: goes by the token's id (a token, task, domain or language id) instead of its content.
//
//   S = row `id` of a table [ids, k], or, without a table, the one expert id mod experts
//   g = 1 / k on S, no parameters
//
// Shapes: ids [tokens], table [ids, k]. Who has no slot: hash_rule.hpp.
//
// Roller et al., "Hash Layers for Large Sparse Models", 2021; the domain map of DEMix.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/hash_rule.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class HashRouter : public HeadRouter<T, NoHead<T>, HashRule<T>> {
 public:
  struct Config {
    Index width = 0;  ///< of x, which is not read
    Index experts = 0;
    Index k = 1;  ///< 1 ... experts; 1 without a table

    static constexpr std::string_view kind() noexcept { return "hash"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit HashRouter(const Config& config)
      : HeadRouter<T, NoHead<T>, HashRule<T>>(
            no_head<T>("HashRouter", config.width, config.experts), {config.k, false, {}}),
        config_(config) {
    require_k("HashRouter", config.k, config.experts);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

#ifndef MOLE_HEADER_ONLY
extern template class HeadRouter<float, NoHead<float>, HashRule<float>>;
extern template class HeadRouter<double, NoHead<double>, HashRule<double>>;
#endif

static_assert(Router<HashRouter<float>>);
static_assert(Router<HashRouter<double>>);

}  // namespace mole::inline MOLE_ABI

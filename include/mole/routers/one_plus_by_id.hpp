// SPDX-License-Identifier: Apache-2.0
// OnePlusByIdRouter: OnePlusRouter with several matrices, say one for text and one for images, over
// the same experts; the id of a token says which is its own.
//
//   l_t = x_t W_hᵀ + b_h (+ overrides)    h = id of the token mod heads; no ids: head 0
//   S   = the k largest l, ties to the lower expert       gate = 1 + l on S
//
// Shapes: x [tokens, width], W [heads * experts, width], b [1, heads * experts], ids [tokens]. A
// token with a negative id has no slot. The selection is a constant in backward.
//
// He et al., "Understanding and Harnessing Sparsity in Unified Multimodal Models", 2025.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routers/one_plus.hpp"
#include "mole/routing/by_id_head.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class OnePlusByIdRouter : public HeadRouter<T, ByIdHead<T>, OnePlusRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 2;  ///< 1 ... experts
    Index heads = 2;
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "one_plus_by_id"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field::required("heads"), c.heads...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit OnePlusByIdRouter(const Config& config)
      : HeadRouter<T, ByIdHead<T>, OnePlusRule<T>>(
            by_id_head<T>("OnePlusByIdRouter", config.width, config.experts, config.heads,
                          config.bias),
            {config.k}),
        config_(config) {
    require_k("OnePlusByIdRouter", config.k, config.experts);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

#ifndef MOLE_HEADER_ONLY
extern template class HeadRouter<float, ByIdHead<float>, OnePlusRule<float>>;
extern template class HeadRouter<double, ByIdHead<double>, OnePlusRule<double>>;
#endif

static_assert(Router<OnePlusByIdRouter<float>>);
static_assert(Router<OnePlusByIdRouter<double>>);

}  // namespace mole::inline MOLE_ABI

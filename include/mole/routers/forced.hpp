// SPDX-License-Identifier: Apache-2.0
// ForcedRouter: the caller says who works. Reads neither x nor parameters.
//
//   S = the k experts the caller names for the token      g = gate on S
//
// Shapes: experts [tokens or more, k]. An entry of -1, an expert that is not available and one
// named twice have no slot. No gradient.
//
// For one expert a sample in training (enforced routing), and pools that a host manages.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct ForcedRule {
  struct Buffers {
    MatView<const std::int32_t> experts = {};  ///< [tokens or more, k], -1 = none

    /// Inputs of one call: not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  Index k = 1;
  T gate = T(1);

  Index max_per_token(Index) const noexcept { return k; }
  void check(const Buffers& buffers, Index tokens, Index experts) const;
  Index forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept;
  void backward(const RuleRow<T>&, const Buffers&, const RuleRowGradient<T>&) const noexcept {}
};

template <class T>
class ForcedRouter : public HeadRouter<T, NoHead<T>, ForcedRule<T>> {
 public:
  struct Config {
    Index width = 0;  ///< of x, which is not read
    Index experts = 0;
    Index k = 1;    ///< 1 ... experts
    T gate = T(1);  ///< of every slot

    static constexpr std::string_view kind() noexcept { return "forced"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"k"}, c.k...);
      f(Field{"gate"}, c.gate...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit ForcedRouter(const Config& config)
      : HeadRouter<T, NoHead<T>, ForcedRule<T>>(
            no_head<T>("ForcedRouter", config.width, config.experts), {config.k, config.gate}),
        config_(config) {
    require_k("ForcedRouter", config.k, config.experts);
    require_finite("ForcedRouter", "gate", config.gate);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
void ForcedRule<T>::check(const Buffers& buffers, Index tokens, Index experts) const {
  if (tokens == 0) return;
  require(buffers.experts.rows >= tokens, Errc::shape_mismatch, "experts: expected at least ",
          tokens, " rows, got ", buffers.experts.rows);
  require_shape("experts", buffers.experts, buffers.experts.rows, k);
  for (Index t = 0; t < tokens; ++t) {
    for (const std::int32_t e : buffers.experts.row(t)) {
      require(e >= -1 && e < experts, Errc::invalid_argument, "experts: token ", t, ": expert ", e,
              " is not in -1 ... ", experts - 1);
    }
  }
}

template <class T>
Index ForcedRule<T>::forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept {
  std::fill(row.prob.begin(), row.prob.end(), T(0));
  Index count = 0;
  for (const std::int32_t e : buffers.experts.row(row.token)) {
    const auto end = row.chosen.begin() + count;
    if (e < 0 || row.logits[e] == -std::numeric_limits<T>::infinity()) continue;
    if (std::find(row.chosen.begin(), end, e) != end) continue;
    row.gate[count] = gate;
    row.chosen[count++] = e;
  }
  return count;
}

#ifndef MOLE_HEADER_ONLY
extern template struct ForcedRule<float>;
extern template struct ForcedRule<double>;
extern template class HeadRouter<float, NoHead<float>, ForcedRule<float>>;
extern template class HeadRouter<double, NoHead<double>, ForcedRule<double>>;
#endif

static_assert(Router<ForcedRouter<float>>);
static_assert(Router<ForcedRouter<double>>);

}  // namespace mole::inline MOLE_ABI

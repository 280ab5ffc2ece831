// SPDX-License-Identifier: Apache-2.0
// RandomRouter: chance says who works. Reads neither x nor parameters.
//
//   S = k different experts, drawn from those available      g = gate on S
//
// The draw of token t is a function of (seed, call, its id, or t without ids) alone: the same for
// any number of threads, and for a token that has an id in any batch. No gradient.
//
// Zuo et al., "Taming Sparsely Activated Transformer with Stochastic Experts" (THOR), 2022, with
// k = 2 and gate 1/2; a baseline for every learned router.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/random.hpp"
#include "mole/routing/head_router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct RandomRule {
  struct Buffers {
    std::uint64_t call = 0;  ///< a number of its own for every call, so that draws differ

    /// An input of one call: not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  Index k = 1;
  T gate = T(1);
  std::uint64_t seed = 0;

  Index max_per_token(Index) const noexcept { return k; }
  Index forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept;
  void backward(const RuleRow<T>&, const Buffers&, const RuleRowGradient<T>&) const noexcept {}
};

template <class T>
class RandomRouter : public HeadRouter<T, NoHead<T>, RandomRule<T>> {
 public:
  struct Config {
    Index width = 0;  ///< of x, which is not read
    Index experts = 0;
    Index k = 1;    ///< 1 ... experts
    T gate = T(1);  ///< of every slot
    std::uint32_t seed = 0;

    static constexpr std::string_view kind() noexcept { return "random"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"k"}, c.k...);
      f(Field{"gate"}, c.gate...);
      f(Field{"seed"}, c.seed...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit RandomRouter(const Config& config)
      : HeadRouter<T, NoHead<T>, RandomRule<T>>(
            no_head<T>("RandomRouter", config.width, config.experts),
            {config.k, config.gate, config.seed}),
        config_(config) {
    require_k("RandomRouter", config.k, config.experts);
    require_finite("RandomRouter", "gate", config.gate);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
Index RandomRule<T>::forward(const RuleRow<T>& row, const Buffers& buffers) const noexcept {
  std::fill(row.prob.begin(), row.prob.end(), T(0));
  Index available = 0;
  for (std::size_t e = 0; e < row.logits.size(); ++e) {
    if (row.logits[e] == -std::numeric_limits<T>::infinity()) continue;
    row.order[available++] = static_cast<std::int32_t>(e);
  }
  const Random random(seed, buffers.call);
  const auto token = static_cast<std::uint64_t>(row.id >= 0 ? Index{row.id} : row.token);
  const Index count = std::min(k, available);
  for (Index i = 0; i < count; ++i) {
    const auto n = token * static_cast<std::uint64_t>(k) + static_cast<std::uint64_t>(i);
    const auto left = static_cast<std::uint64_t>(available - i);
    std::swap(row.order[i], row.order[i + static_cast<Index>(random.below(n, left))]);
    row.chosen[i] = row.order[i];
    row.gate[i] = gate;
  }
  return count;
}

#ifndef MOLE_HEADER_ONLY
extern template struct RandomRule<float>;
extern template struct RandomRule<double>;
extern template class HeadRouter<float, NoHead<float>, RandomRule<float>>;
extern template class HeadRouter<double, NoHead<double>, RandomRule<double>>;
#endif

static_assert(Router<RandomRouter<float>>);
static_assert(Router<RandomRouter<double>>);

}  // namespace mole::inline MOLE_ABI

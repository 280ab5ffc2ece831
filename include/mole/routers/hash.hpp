// SPDX-License-Identifier: Apache-2.0
// Routers that go by the token's id (a token, task, domain or language id) instead of its content.
//
//   S = row `id` of a table [ids, k], or, without a table, the one expert id mod experts
//
//   HashRouter          g = 1 / k on S, no parameters
//   ScoredHashRouter    s = σ(l) or √softplus(l), l = x Wᵀ + b    g = scale · s / (Σ_S s + epsilon)
//
// Shapes: x [tokens, width], W [experts, width], ids [tokens], table [ids, k]. A token whose id is
// negative or beyond the table, an expert that is not available and an entry that is no expert have
// no slot; an expert named twice in a row counts once.
//
// Roller et al., "Hash Layers for Large Sparse Models", 2021; DEMix (domain map), DeepSeek-V4
// scores.
#pragma once

#include <cmath>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"

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
      : HeadRouter<T, NoHead<T>, HashRule<T>>({config.width, config.experts},
                                              {config.k, false, {}}),
        config_(config) {
    linear_head<T>("HashRouter", config.width, config.experts, false);
    require_field(config.k >= 1 && config.k <= config.experts, "HashRouter", "k", "1 ... experts",
                  config.k);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
class ScoredHashRouter : public HeadRouter<T, LinearHead<T>, HashRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 1;  ///< 1 ... experts; 1 without a table
    Score score = Score::sqrt_softplus;
    T renorm_epsilon = T(1e-20);
    T scale = T(1);
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "scored_hash"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"score"}, c.score...);
      f(Field{"renorm_epsilon"}, c.renorm_epsilon...);
      f(Field{"scale"}, c.scale...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit ScoredHashRouter(const Config& config)
      : HeadRouter<T, LinearHead<T>, HashRule<T>>(
            linear_head<T>("ScoredHashRouter", config.width, config.experts, config.bias),
            {config.k, true, {config.score, false, true, config.renorm_epsilon, config.scale}}),
        config_(config) {
    require_field(config.k >= 1 && config.k <= config.experts, "ScoredHashRouter", "k",
                  "1 ... experts", config.k);
    require_field(config.renorm_epsilon >= T(0) && std::isfinite(config.renorm_epsilon),
                  "ScoredHashRouter", "renorm_epsilon", "a number from 0 up",
                  config.renorm_epsilon);
    require_field(std::isfinite(config.scale), "ScoredHashRouter", "scale", "a finite number",
                  config.scale);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
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
extern template class HeadRouter<float, NoHead<float>, HashRule<float>>;
extern template class HeadRouter<double, NoHead<double>, HashRule<double>>;
extern template class HeadRouter<float, LinearHead<float>, HashRule<float>>;
extern template class HeadRouter<double, LinearHead<double>, HashRule<double>>;
#endif

static_assert(Router<HashRouter<float>>);
static_assert(Router<HashRouter<double>>);
static_assert(Router<ScoredHashRouter<float>>);
static_assert(Router<ScoredHashRouter<double>>);

}  // namespace mole::inline MOLE_ABI

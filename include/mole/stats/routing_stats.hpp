// SPDX-License-Identifier: Apache-2.0
// What a router did, as a value: counts, load, gates, balance, who worked together.
//
//   RoutingStats stats(layer.router().experts());
//   stats.add(session.routing());                         // after every call; or
//   stats.add(session.routing(), labels, kGerman);        // only the tokens with this label
//   stats.dead();  stats.max_over_mean();
//
// A slot with the gate 0 is a probe and does not count. Gates are weighed by size: the share of a
// slot in its token is |g| / Σ |g|. The table of pairs is [experts, experts], of 8 bytes each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

class RoutingStats {
 public:
  static constexpr Index kMostExperts = 4096;

  /// Throws invalid_argument unless it is 1 ... kMostExperts.
  explicit RoutingStats(Index experts);

  /// Throws shape_mismatch for another number of experts.
  template <class T>
  void add(const Routing<T>& routing);
  /// The tokens t with labels[t] == label; labels [tokens].
  template <class T>
  void add(const Routing<T>& routing, std::span<const std::int64_t> labels, std::int64_t label);
  /// Of another worker, another batch.
  void add(const RoutingStats& other);

  Index experts() const noexcept { return experts_; }
  std::int64_t tokens() const noexcept { return tokens_; }
  /// Pairs of a token and an expert that worked on it.
  std::int64_t slots() const noexcept { return slots_; }
  /// Tokens on which no expert worked.
  std::int64_t idle_tokens() const noexcept { return idle_; }

  /// Tokens that expert e worked on.
  std::int64_t count(Index e) const noexcept { return together(e, e); }
  /// Tokens that both worked on.
  std::int64_t together(Index a, Index b) const noexcept { return together_[a * experts_ + b]; }
  /// Its share of the slots, 0 ... 1.
  double load(Index e) const noexcept { return ratio(static_cast<double>(count(e)), slots_); }
  /// Over all tokens, those without it too.
  double mean_gate(Index e) const noexcept { return ratio(gate_[e], tokens_); }

  double experts_per_token() const noexcept { return ratio(static_cast<double>(slots_), tokens_); }
  /// Mean over the tokens of -Σ s ln s, s their shares, in nats; idle tokens have 0.
  double gate_entropy() const noexcept { return ratio(entropy_, tokens_); }
  /// -Σ load ln load / ln experts: 1 for even load, 0 if one expert does everything.
  double load_entropy() const noexcept;
  /// Standard deviation of the counts over their mean, 0 for even load.
  double load_cv() const noexcept;
  /// The busiest expert's count over the mean, 1 for even load.
  double max_over_mean() const noexcept;
  /// Experts that worked on no token.
  std::vector<Index> dead() const;

 private:
  static double ratio(double part, std::int64_t whole) noexcept {
    return whole == 0 ? 0 : part / static_cast<double>(whole);
  }
  void require_experts(Index experts) const;
  template <class T>
  void add_token(const Routing<T>& routing, Index token);

  Index experts_;
  std::int64_t tokens_ = 0, slots_ = 0, idle_ = 0;
  double entropy_ = 0;
  std::vector<double> gate_;            // [experts], sums
  std::vector<std::int64_t> together_;  // [experts, experts]
};

inline RoutingStats::RoutingStats(Index experts) : experts_(experts) {
  require(experts >= 1 && experts <= kMostExperts, Errc::invalid_argument,
          "routing stats: ", experts, " experts, expected 1 ... ", kMostExperts);
  gate_.resize(static_cast<std::size_t>(experts));
  together_.resize(static_cast<std::size_t>(experts * experts));
}

inline void RoutingStats::require_experts(Index experts) const {
  require(experts == experts_, Errc::shape_mismatch, "routing stats: of ", experts_,
          " experts, got a routing of ", experts);
}

template <class T>
void RoutingStats::add_token(const Routing<T>& routing, Index token) {
  const Index begin = routing.token_begin[token], end = routing.token_begin[token + 1];
  double total = 0;
  Index active = 0;
  for (Index s = begin; s < end; ++s) {
    if (routing.gate[s] == T(0)) continue;
    ++active;
    total += std::fabs(static_cast<double>(routing.gate[s]));
    gate_[routing.expert[s]] += static_cast<double>(routing.gate[s]);
    for (Index other = begin; other < end; ++other) {
      if (routing.gate[other] == T(0)) continue;
      ++together_[routing.expert[s] * experts_ + routing.expert[other]];
    }
  }
  for (Index s = begin; s < end; ++s) {
    const double share = std::fabs(static_cast<double>(routing.gate[s])) / total;
    if (share > 0) entropy_ = std::fma(-share, std::log(share), entropy_);
  }
  ++tokens_;
  slots_ += active;
  idle_ += active == 0;
}

template <class T>
void RoutingStats::add(const Routing<T>& routing) {
  require_experts(routing.experts);
  for (Index t = 0; t < routing.tokens; ++t) add_token(routing, t);
}

template <class T>
void RoutingStats::add(const Routing<T>& routing, std::span<const std::int64_t> labels,
                       std::int64_t label) {
  require_experts(routing.experts);
  require(static_cast<Index>(labels.size()) == routing.tokens, Errc::shape_mismatch,
          "routing stats: ", labels.size(), " labels for ", routing.tokens, " tokens");
  for (Index t = 0; t < routing.tokens; ++t) {
    if (labels[t] == label) add_token(routing, t);
  }
}

inline void RoutingStats::add(const RoutingStats& other) {
  require_experts(other.experts_);
  tokens_ += other.tokens_;
  slots_ += other.slots_;
  idle_ += other.idle_;
  entropy_ += other.entropy_;
  for (std::size_t i = 0; i < gate_.size(); ++i) gate_[i] += other.gate_[i];
  for (std::size_t i = 0; i < together_.size(); ++i) together_[i] += other.together_[i];
}

inline double RoutingStats::load_entropy() const noexcept {
  if (experts_ == 1) return slots_ > 0 ? 1 : 0;
  double sum = 0;
  for (Index e = 0; e < experts_; ++e) {
    if (count(e) > 0) sum = std::fma(-load(e), std::log(load(e)), sum);
  }
  return sum / std::log(static_cast<double>(experts_));
}

inline double RoutingStats::load_cv() const noexcept {
  if (slots_ == 0) return 0;
  const double mean = static_cast<double>(slots_) / static_cast<double>(experts_);
  double sum = 0;
  for (Index e = 0; e < experts_; ++e) {
    const double difference = static_cast<double>(count(e)) - mean;
    sum = std::fma(difference, difference, sum);
  }
  return std::sqrt(sum / static_cast<double>(experts_)) / mean;
}

inline double RoutingStats::max_over_mean() const noexcept {
  std::int64_t most = 0;
  for (Index e = 0; e < experts_; ++e) most = std::max(most, count(e));
  return ratio(static_cast<double>(most) * static_cast<double>(experts_), slots_);
}

inline std::vector<Index> RoutingStats::dead() const {
  std::vector<Index> experts;
  for (Index e = 0; e < experts_; ++e) {
    if (count(e) == 0) experts.push_back(e);
  }
  return experts;
}

}  // namespace mole::inline MOLE_ABI

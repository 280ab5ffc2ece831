// SPDX-License-Identifier: Apache-2.0
// What holds for the routing table and for every selector, whatever comes in.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <vector>

#include "mole/core/workspace.hpp"
#include "mole/routing/routing.hpp"
#include "mole/routing/stages.hpp"
#include "support/property.hpp"

namespace {

using mole::Index;
using test::holds;
using Ids = std::vector<std::int32_t>;
using Row = std::vector<float>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Scores with many ties, and now and then something that is no number.
rc::Gen<float> any_score() {
  return rc::gen::oneOf(
      rc::gen::map(rc::gen::inRange(-4, 5), [](int i) { return static_cast<float>(i) / 2; }),
      rc::gen::map(rc::gen::inRange(-1'000'000, 1'000'000),
                   [](int i) { return static_cast<float>(i) * 1e-5f; }),
      rc::gen::element(0.0f, -0.0f, kInf, -kInf, kNan, 1e38f, -1e38f, 1e-40f));
}
rc::Gen<Row> any_row() {
  return rc::gen::container<Row>(any_score());
}
/// Scores of a softmax: from 0 to 1, at least one of them.
Row any_shares() {
  Row u = *rc::gen::nonEmpty(rc::gen::container<Row>(
      rc::gen::map(rc::gen::inRange(-800, 800), [](int i) { return static_cast<float>(i) / 40; })));
  mole::stages::softmax<float>(u, u);
  return u;
}

bool is_permutation_of_ids(Ids ids, std::size_t bound) {
  std::ranges::sort(ids);
  return std::ranges::adjacent_find(ids) == ids.end() &&
         std::ranges::all_of(ids, [&](auto e) { return e >= 0 && e < static_cast<Index>(bound); });
}

/// Indices of keys above -inf, by falling key, the lower one first among equals.
Ids in_order(const Row& key) {
  Ids order;
  for (std::size_t e = 0; e < key.size(); ++e) {
    if (key[e] > -kInf) order.push_back(static_cast<std::int32_t>(e));
  }
  std::ranges::stable_sort(order, [&](auto a, auto b) { return key[a] > key[b]; });
  return order;
}

Ids sorted(const Row& key) {
  Ids order(key.size(), -1);
  order.resize(static_cast<std::size_t>(mole::stages::sort_keys<float>(key, order)));
  return order;
}

}  // namespace

TEST_CASE("property: the routing table holds what was selected, both ways", "[routing][property]") {
  CHECK(holds("for any selections in any order of tokens", [] {
    const auto tokens = *rc::gen::inRange<Index>(0, 12), experts = *rc::gen::inRange<Index>(1, 9);
    const auto room = *rc::gen::inRange<Index>(0, experts + 1);
    mole::Buffer memory(mole::RoutingTable<float>::bytes(tokens, experts, room));
    mole::Workspace workspace(memory.span());
    mole::RoutingTable<float> table(workspace, tokens, experts, room);
    std::vector<std::map<std::int32_t, float>> model(static_cast<std::size_t>(tokens));
    table.begin(tokens);
    Ids all(static_cast<std::size_t>(experts));
    std::iota(all.begin(), all.end(), 0);
    const auto times = *rc::gen::inRange<Index>(0, 2 * tokens + 1);
    for (Index i = 0; i < times; ++i) {  // some tokens twice: the last selection counts
      const auto t = *rc::gen::inRange<Index>(0, tokens);
      Ids chosen = *rc::gen::just(all);
      for (std::size_t e = chosen.size(); e-- > 1;) {
        std::swap(chosen[e], chosen[*rc::gen::inRange<std::size_t>(0, e + 1)]);
      }
      chosen.resize(*rc::gen::inRange<std::size_t>(0, static_cast<std::size_t>(room) + 1));
      Row gates;
      model[t].clear();
      for (const auto e : chosen) {
        gates.push_back(*rc::gen::element(0.0f, 0.5f, -1.0f, kInf));
        model[t][e] = gates.back();
      }
      table.select(t, chosen, gates);
    }
    table.finish();
    const mole::Routing<float> routing = table.view();

    RC_ASSERT((routing.tokens == tokens && routing.experts == experts));
    RC_ASSERT(routing.token_begin.front() == 0);
    RC_ASSERT(routing.token_begin.back() == routing.slots());
    for (Index t = 0; t < tokens; ++t) {  // a map is ascending by expert, as the slots must be
      auto slot = routing.token_begin[t];
      for (const auto& [e, gate] : model[t]) {
        RC_ASSERT(slot < routing.token_begin[t + 1]);
        RC_ASSERT(routing.expert[slot] == e);
        RC_ASSERT(routing.gate[slot] == gate);
        ++slot;
      }
      RC_ASSERT(slot == routing.token_begin[t + 1]);
    }
    const auto& lists = routing.lists;
    std::set<std::int32_t> seen;
    for (Index e = 0; e < experts; ++e) {
      RC_ASSERT(lists.expert_begin[e] <= lists.active_end[e]);
      RC_ASSERT(lists.active_end[e] <= lists.expert_begin[e + 1]);
      for (auto i = lists.expert_begin[e]; i < lists.expert_begin[e + 1]; ++i) {
        const auto slot = lists.slot_of[i], token = lists.token_of[i];
        seen.insert(slot);
        RC_ASSERT(routing.expert[slot] == e);
        RC_ASSERT((routing.token_begin[token] <= slot && slot < routing.token_begin[token + 1]));
        RC_ASSERT((routing.gate[slot] != 0) == (i < lists.active_end[e]));
        const bool starts_part = i == lists.expert_begin[e] || i == lists.active_end[e];
        RC_ASSERT((starts_part || lists.token_of[i - 1] < token));
      }
    }
    RC_ASSERT(static_cast<Index>(seen.size()) == routing.slots());
  }));
}

TEST_CASE("property: sort_keys gives the order", "[routing][property]") {
  CHECK(holds("for any keys", [] {
    const Row key = *any_row();
    RC_ASSERT(sorted(key) == in_order(key));
  }));
}

TEST_CASE("property: select_top_k is the front of the order", "[routing][property]") {
  CHECK(holds("for any keys and k", [] {
    const Row key = *any_row();
    Ids chosen(*rc::gen::inRange<std::size_t>(0, key.size() + 1), -1);
    chosen.resize(static_cast<std::size_t>(mole::stages::select_top_k<float>(key, chosen)));
    const Ids order = in_order(key);
    RC_ASSERT(chosen.size() <= order.size());
    RC_ASSERT(std::ranges::equal(chosen, std::span(order).first(chosen.size())));
  }));
}

TEST_CASE("property: a key of -inf where the logit is, and nothing else", "[routing][property]") {
  CHECK(holds("for any logits and values", [] {
    const Row u = *any_row();
    Row value(u.size(), 0.5f), bias, key(u.size());
    if (*rc::gen::arbitrary<bool>()) bias.assign(u.size(), 0.25f);
    mole::stages::selection_key<float>(u, value, bias, key);
    for (std::size_t e = 0; e < u.size(); ++e) {
      RC_ASSERT(key[e] == (u[e] == -kInf ? -kInf : bias.empty() ? 0.5f : 0.75f));
    }
  }));
}

TEST_CASE("property: select_mass is the front of the order", "[routing][property]") {
  CHECK(holds("for any keys, target and bounds", [] {
    const Row key = *any_row();
    Row share(key.size());
    mole::stages::softmax<float>(key, share);
    for (float& s : share) s /= static_cast<float>(*rc::gen::element(1, 2));
    const Ids order = sorted(key);
    mole::stages::Mass<float> mass;
    mass.target = static_cast<float>(*rc::gen::inRange(0, 101)) / 100;
    mass.include_crossing = *rc::gen::arbitrary<bool>();
    mass.at_least = *rc::gen::inRange<Index>(0, static_cast<Index>(order.size()) + 2);
    mass.at_most = *rc::gen::inRange<Index>(0, static_cast<Index>(order.size()) + 2);
    Ids chosen(key.size(), -1);
    const Index count = mole::stages::select_mass<float>(mass, key, share, chosen);
    RC_ASSERT(count == mole::stages::mass_count<float>(mass, share, order));
    RC_ASSERT(std::ranges::equal(std::span(chosen).first(count), std::span(order).first(count)));
  }));
}

TEST_CASE("property: mass_count keeps the least that is enough", "[routing][property]") {
  CHECK(holds("for any shares, target and bounds", [] {
    const Row share = any_shares();
    const Ids order = sorted(share);
    const auto found = static_cast<Index>(order.size());
    mole::stages::Mass<float> mass;
    mass.target = static_cast<float>(*rc::gen::inRange(0, 101)) / 100;
    mass.at_least = *rc::gen::inRange<Index>(0, found + 2);
    mass.at_most = *rc::gen::inRange<Index>(0, found + 2);
    const auto count = [&](mole::stages::Mass<float> m) {
      return mole::stages::mass_count<float>(m, share, order);
    };
    const Index most = mass.at_most > 0 ? std::min(mass.at_most, found) : found;
    mass.include_crossing = false;
    const Index without = count(mass);
    mass.include_crossing = true;
    const Index with = count(mass);
    RC_ASSERT((without <= with && with <= without + 1));
    RC_ASSERT(with <= most);
    RC_ASSERT(with >= std::min(mass.at_least, most));

    const mole::stages::Mass<float> free = {.target = mass.target, .at_least = 0};
    float sum = 0;
    for (Index i = 0; i < count(free); ++i) {
      RC_ASSERT(sum <= free.target);  // each was still needed
      sum += share[order[i]];
    }
    RC_ASSERT((count(free) == found || sum > free.target));
    auto more = free;
    more.target += 0.125f;
    RC_ASSERT(count(more) >= count(free));
  }));
}

TEST_CASE("property: limit_threshold keeps what reaches it, in order", "[routing][property]") {
  CHECK(holds("for any gates", [] {
    Row gate = *any_row();
    Ids chosen(gate.size());
    std::iota(chosen.begin(), chosen.end(), 0);
    const Row before = gate;
    const auto threshold = static_cast<float>(*rc::gen::inRange(-4, 5)) / 2;
    Ids expected;
    for (const auto e : chosen) {
      if (before[e] >= threshold) expected.push_back(e);
    }
    const Index kept = mole::stages::limit_threshold<float>(threshold, chosen, gate);
    chosen.resize(static_cast<std::size_t>(kept));
    RC_ASSERT(chosen == expected);
    for (std::size_t i = 0; i < chosen.size(); ++i) RC_ASSERT(gate[i] == before[chosen[i]]);
  }));
}

TEST_CASE("property: limit_capacity never gives an expert more", "[routing][property]") {
  CHECK(holds("for any requests, one token after the other", [] {
    const auto experts = *rc::gen::inRange<std::size_t>(1, 7);
    const auto capacity = *rc::gen::inRange<Index>(0, 4);
    Ids used(experts, 0), taken(experts, 0), asked(experts, 0);
    const auto tokens = *rc::gen::inRange(0, 20);
    for (int t = 0; t < tokens; ++t) {
      Ids chosen = *rc::gen::unique<Ids>(
          rc::gen::inRange<std::int32_t>(0, static_cast<std::int32_t>(experts)));
      Row gate(chosen.size(), 1.0f);
      for (const auto e : chosen) ++asked[e];
      const Index kept = mole::stages::limit_capacity<float>(capacity, used, chosen, gate);
      for (Index i = 0; i < kept; ++i) ++taken[chosen[i]];
    }
    for (std::size_t e = 0; e < experts; ++e) {
      RC_ASSERT(taken[e] == std::min<Index>(asked[e], capacity));
    }
  }));
}

TEST_CASE("property: scores are shares, and follow their experts", "[routing][property]") {
  CHECK(holds("for any logits without NaN", [] {
    Row u = *rc::gen::container<Row>(
        rc::gen::suchThat(any_score(), [](float value) { return value == value; }));
    Row p(u.size());
    mole::stages::softmax<float>(u, p);
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    const bool available = std::ranges::any_of(u, [](float value) { return value > -kInf; });
    RC_ASSERT(std::abs(sum - (available ? 1.0 : 0.0)) <= 1e-6);
    for (std::size_t e = 0; e < u.size(); ++e) {
      RC_ASSERT(p[e] >= 0);
      RC_ASSERT((u[e] > -kInf || p[e] == 0));
      for (std::size_t other = 0; other < e; ++other)
        RC_ASSERT((u[e] < u[other] || p[e] >= p[other]));
    }
  }));
}

TEST_CASE("property: gates of a selection that is renormalised sum to the scale",
          "[routing][property]") {
  CHECK(holds("for any finite logits, score and k", [] {
    const Row u = *rc::gen::nonEmpty(rc::gen::container<Row>(rc::gen::map(
        rc::gen::inRange(-4000, 4000), [](int i) { return static_cast<float>(i) / 40; })));
    const auto score =
        *rc::gen::element(mole::Score::softmax, mole::Score::sigmoid, mole::Score::sqrt_softplus);
    Row s(u.size());
    mole::stages::score<float>(score, u, s);
    Ids chosen(*rc::gen::inRange<std::size_t>(1, u.size() + 1), -1);
    mole::stages::select_top_k<float>(u, chosen);
    RC_ASSERT(is_permutation_of_ids(chosen, u.size()));
    Row gate(chosen.size());
    mole::stages::weigh<float>({.score = score, .renormalise = true, .scale = 2.5f}, u, s, chosen,
                               gate);
    RC_ASSERT(std::abs(std::accumulate(gate.begin(), gate.end(), 0.0) - 2.5) <= 5e-6);
    for (std::size_t i = 1; i < gate.size(); ++i) RC_ASSERT(gate[i] <= gate[i - 1]);
  }));
}

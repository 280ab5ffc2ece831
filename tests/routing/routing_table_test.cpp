// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/routing.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/slots.hpp"

namespace {

using Ids = std::vector<std::int32_t>;
using mole::Index;
using mole::RoutingTable;

template <class V>
Ids ids(std::span<V> span) {
  return Ids(span.begin(), span.end());
}

struct Table {
  Table(Index tokens, Index experts, Index per_token)
      : memory(RoutingTable<float>::bytes(tokens, experts, per_token)),
        workspace(memory.span()),
        table(workspace, tokens, experts, per_token) {}

  void select(Index token, const Ids& experts, const std::vector<float>& gates) {
    table.select(token, experts, gates);
  }

  mole::Buffer memory;
  mole::Workspace workspace;
  RoutingTable<float> table;
};

}  // namespace

TEST_CASE("a routing table sorts rows and builds both directions", "[routing]") {
  Table t(4, 5, 3);
  t.table.begin(4);
  t.select(2, {4, 0, 3}, {0.5f, 0.0f, 0.25f});  // tokens and experts in any order
  t.select(0, {3, 1}, {1.0f, 2.0f});
  t.select(3, {3}, {0.0f});
  t.table.finish();
  const mole::Routing<float> r = t.table.view();

  CHECK(r.tokens == 4);
  CHECK(r.experts == 5);
  CHECK(r.slots() == 6);
  CHECK(ids(r.token_begin) == Ids{0, 2, 2, 5, 6});
  CHECK(ids(r.expert) == Ids{1, 3, 0, 3, 4, 3});
  CHECK(test::bit_difference(r.gate, std::vector<float>{2, 1, 0, 0.25, 0.5, 0}) == "");
  CHECK(ids(r.lists.expert_begin) == Ids{0, 1, 2, 2, 5, 6});
  CHECK(ids(r.lists.active_end) == Ids{0, 2, 2, 4, 6});
  CHECK(ids(r.lists.slot_of) == Ids{2, 0, 1, 3, 5, 4});
  CHECK(ids(r.lists.token_of) == Ids{2, 0, 0, 2, 3, 2});
  CHECK(!r.is_dense());
}

TEST_CASE("the lists by expert hold every slot once, active before probes", "[routing]") {
  const test::OwnedRouting<double> owned(test::random_slots(53, 7, 0.4, 9), 7);
  const mole::Routing<double>& r = *owned;
  Ids seen(static_cast<std::size_t>(r.slots()), 0);
  for (Index e = 0; e < r.experts; ++e) {
    for (Index i = r.lists.expert_begin[e]; i < r.lists.expert_begin[e + 1]; ++i) {
      const std::int32_t slot = r.lists.slot_of[i], token = r.lists.token_of[i];
      ++seen[slot];
      CHECK(r.expert[slot] == e);
      CHECK((r.token_begin[token] <= slot && slot < r.token_begin[token + 1]));
      CHECK((r.gate[slot] != 0) == (i < r.lists.active_end[e]));
      if (i > r.lists.expert_begin[e] && i != r.lists.active_end[e])
        CHECK(r.lists.token_of[i - 1] < token);
    }
  }
  CHECK(seen == Ids(seen.size(), 1));
}

TEST_CASE("a routing is dense when every token has every expert", "[routing]") {
  Table t(2, 2, 2);
  const std::vector<float> gates = {1, 2}, with_zero = {1, 0};
  t.table.begin(2);
  t.table.select_all(0, gates);
  t.table.select_all(1, gates);
  t.table.finish();
  CHECK(t.table.view().is_dense());
  t.table.begin(2);
  t.table.select_all(0, gates);
  t.table.select_all(1, with_zero);
  t.table.finish();
  CHECK(!t.table.view().is_dense());
}

TEST_CASE("a routing table is used again for fewer tokens", "[routing]") {
  Table t(3, 2, 1);
  t.table.begin(3);
  for (Index token = 0; token < 3; ++token) t.select(token, {1}, {1.0f});
  t.table.finish();
  t.table.begin(1);
  t.table.finish();
  CHECK(t.table.view().tokens == 1);
  CHECK(t.table.view().slots() == 0);
  CHECK(ids(t.table.view().lists.expert_begin) == Ids{0, 0, 0});
}

TEST_CASE("a routing table refuses what does not fit", "[routing]") {
  Table t(2, 4, 2);
  t.table.begin(2);
  t.select(0, {2}, {1.0f});
  t.table.finish();
  CHECK_THROWS_WITH(t.table.begin(3), "routing table: 3 tokens, it was made for at most 2");
  CHECK(t.table.view().slots() == 1);
  t.table.begin(2);
  CHECK_THROWS_WITH(t.select(1, {0, 1, 2}, {1, 1, 1}),
                    "token 1: 3 experts, the table holds at most 2 a token");
  CHECK_THROWS_WITH(t.select(0, {4}, {1}), "token 0: expert 4 is not in 0 ... 3");
  CHECK_THROWS_WITH(t.select(0, {-1}, {1}), "token 0: expert -1 is not in 0 ... 3");
  CHECK_THROWS_WITH(t.select(0, {3, 3}, {1, 1}), "token 0: expert 3 is selected twice");
  CHECK_THROWS_WITH(t.select(0, {3}, {1, 1}), "token 0: 1 experts but 2 gates");
  t.table.finish();
  CHECK(t.table.view().slots() == 0);  // what was refused left nothing
  mole::Workspace empty;
  CHECK_THROWS_WITH(RoutingTable<float>(empty, 2, 3, 4),
                    "routing table: 2 tokens, 3 experts, at most 4 experts a token");
}

// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/unit.hpp"

#include <cstdint>
#include <vector>

#include "contracts/router_contract.hpp"
#include "support/catch.hpp"

namespace {

using mole::Errc;
using mole::Index;

/// A call of a UnitRouter with its memory.
struct Call {
  Call(Index experts, Index tokens)
      : router({.experts = experts}),
        memory(router.scratch_bytes(tokens, 1) + router.tape_bytes(tokens) +
               mole::RoutingTable<double>::bytes(tokens, experts, experts)),
        workspace(memory.span()),
        table(workspace, tokens, experts, experts),
        tape(router.make_tape(workspace, tokens)) {}

  mole::Routing<double> forward(Index tokens, const mole::Overrides<double>& overrides = {}) {
    const std::vector<double> x(static_cast<std::size_t>(tokens));
    const mole::Context context{.scratch = workspace};
    router.forward({}, {}, {.x = {x.data(), tokens, 1}}, overrides, {}, table, {}, &tape, context);
    return table.view();
  }
  Errc refusal(Index tokens, const mole::Overrides<double>& overrides) {
    try {
      forward(tokens, overrides);
    } catch (const mole::Error& error) {
      return error.code();
    }
    return {};
  }

  mole::UnitRouter<double> router;
  mole::Buffer memory;
  mole::Workspace workspace;
  mole::RoutingTable<double> table;
  mole::RouterTape<double> tape;
};

std::vector<std::int32_t> experts_of(const mole::Routing<double>& routing, Index token) {
  return {routing.expert.begin() + routing.token_begin[token],
          routing.expert.begin() + routing.token_begin[token + 1]};
}

}  // namespace

TEST_CASE("UnitRouter keeps the router contract", "[routers]") {
  const auto check = []<class T>(T) {
    test::router_contract(mole::UnitRouter<T>({.width = 5, .experts = 7}),
                          {.by_score = false, .has_logits = false});
  };
  check(float());
  check(double());
}

TEST_CASE("UnitRouter gives every token every expert with gate 1", "[routers]") {
  Call call(3, 5);

  const auto routing = call.forward(5);

  CHECK(routing.slots() == 15);
  for (Index t = 0; t < 5; ++t) CHECK(experts_of(routing, t) == std::vector<std::int32_t>{0, 1, 2});
  for (Index slot = 0; slot < 15; ++slot) {
    CHECK(routing.gate[slot] == 1);
    CHECK(call.tape.gate(0, slot) == 1);
  }
}

TEST_CASE("UnitRouter leaves out forbidden experts and those beside a forced one", "[routers]") {
  Call call(3, 4);
  const std::vector<std::uint8_t> forbidden = {1, 0, 0};
  const std::vector<std::int32_t> forced = {-1, 2, 0, -1};

  const auto routing = call.forward(4, {.forbidden = {forbidden.data(), 1, 3}, .forced = forced});

  CHECK(experts_of(routing, 0) == std::vector<std::int32_t>{1, 2});
  CHECK(experts_of(routing, 1) == std::vector<std::int32_t>{2});
  CHECK(experts_of(routing, 2).empty());
}

TEST_CASE("UnitRouter refuses what it cannot do and what does not fit", "[routers]") {
  Call call(3, 4);
  const std::vector<double> numbers(12);

  CHECK(call.refusal(4, {.logit_bias = {numbers.data(), 4, 3}}) == Errc::invalid_argument);
  CHECK(call.refusal(4, {.gates = {numbers.data(), 4, 3}}) == Errc::invalid_argument);
  CHECK(call.refusal(5, {}) == Errc::limit_exceeded);
  call.tape = {};
  CHECK(call.refusal(4, {}) == Errc::limit_exceeded);
  CHECK_THROWS_AS(mole::UnitRouter<float>({.experts = 0}), mole::Error);
}

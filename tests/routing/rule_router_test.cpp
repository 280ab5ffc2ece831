// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/rule_router.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/thread_pool.hpp"

namespace {

using mole::Index;

/// Selects every expert, but says that it selects one.
struct Liar {
  Index max_per_token(Index) const noexcept { return 1; }
  void forward(std::span<const double>, std::span<double> prob,
               std::span<double> gate) const noexcept {
    std::fill(prob.begin(), prob.end(), 1.0);
    std::fill(gate.begin(), gate.end(), 1.0);
  }
  void backward(std::span<const double>, std::span<const double>, std::span<const double>,
                std::span<const double>, std::span<const double>,
                std::span<double>) const noexcept {}
};

}  // namespace

TEST_CASE("RuleRouter refuses a rule that selects more than it says, on any thread",
          "[routing][threads]") {
  constexpr Index kTokens = 100, kWidth = 3, kExperts = 4;
  const mole::RuleRouter<double, Liar> router({.width = kWidth, .experts = kExperts});
  const std::vector<double> x(kTokens * kWidth, 1.0), weight(kExperts * kWidth, 1.0);
  ThreadPool pool(3);
  mole::Buffer memory(router.scratch_bytes(kTokens, 3) + router.prepared_bytes() +
                      mole::RoutingTable<double>::bytes(kTokens, kExperts, 1));
  mole::Workspace workspace(memory.span());
  const auto prepared = router.prepare({{weight.data(), kExperts, kWidth}, {}}, workspace);
  mole::RoutingTable<double> table(workspace, kTokens, kExperts, 1);
  const mole::Context context{
      .scratch = workspace, .workers = 3, .hook = &ThreadPool::run, .pool = &pool};

  try {
    router.forward(prepared, {}, {.x = {x.data(), kTokens, kWidth}}, {}, {}, table, {}, nullptr,
                   context);
    FAIL("accepted");
  } catch (const mole::Error& error) {
    CHECK(error.code() == mole::Errc::limit_exceeded);
  }
}

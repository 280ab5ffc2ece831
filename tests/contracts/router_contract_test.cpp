// SPDX-License-Identifier: Apache-2.0
// The suite itself: routers that break one rule each must be found by the check of that rule.
#include "contracts/router_contract.hpp"

#include <memory>
#include <string>
#include <vector>

#include "mole/routers/top_k.hpp"

namespace {

using mole::Index;
using Good = mole::TopKRouter<double>;

enum class Defect {
  takes_the_higher_of_equals,
  reads_the_neighbour,
  gates_depend_on_the_tape,
  gates_depend_on_the_workers,
  gates_depend_on_the_instruction_set,
  spreads_nan_to_the_next_row,
  ignores_overrides,
  selects_nan,
  allocates,
  needs_more_scratch_than_it_says,
  grows_the_table,
  wrong_gradient,
  overwrites_dx,
  needs_dx,
};

/// TopKRouter with something wrong.
template <Defect defect>
class Broken : public Good {
 public:
  using Good::Good;

  std::size_t scratch_bytes(Index tokens, int workers) const noexcept {
    const std::size_t bytes = Good::scratch_bytes(tokens, workers);
    return defect == Defect::needs_more_scratch_than_it_says ? bytes / 2 : bytes;
  }

  void forward(const Prepared& prepared, const Buffers& buffers, const mole::Tokens<double>& tokens,
               const mole::Overrides<double>& overrides, mole::None,
               mole::RoutingTable<double>& table, mole::None, Tape* tape,
               const mole::Context& context) const {
    if (defect == Defect::allocates) spilled_ = std::make_unique<int>(1);
    if (defect == Defect::grows_the_table && tokens.count() > table.max_tokens()) {
      return table.begin(0), table.finish();
    }
    mole::Overrides<double> obeyed = overrides;
    if (defect == Defect::ignores_overrides) obeyed.forbidden = {}, obeyed.forced = {};
    Good::forward(prepared, buffers, tokens, obeyed, {}, table, {}, tape, context);
    rewrite(tokens, overrides, table, tape, context);
    if (tape != nullptr) mole::record_gates(table.view(), *tape);
  }

  void backward(const Params<const double>& params, const Buffers& buffers, const Tape& saved,
                const mole::Tokens<double>& tokens, const mole::Overrides<double>& overrides,
                mole::None, const mole::Routing<double>& routing, const Tape& d_tape, mole::None,
                mole::MatView<double> dx, const Params<double>& grad, mole::None,
                const mole::Context& context) const {
    if (defect == Defect::overwrites_dx && dx.data != nullptr) {
      for (Index t = 0; t < dx.rows; ++t) std::ranges::fill(dx.row(t), 0.0);
    }
    if (defect == Defect::needs_dx && dx.data == nullptr) d_tape.logits(0, 0) += 1;
    Good::backward(params, buffers, saved, tokens, overrides, {}, routing, d_tape, {}, dx, grad, {},
                   context);
    if (defect == Defect::wrong_gradient && dx.data != nullptr) dx(0, 0) += 1e-3;
  }

 private:
  /// Writes the table once more, with the defect.
  void rewrite(const mole::Tokens<double>& tokens, const mole::Overrides<double>& overrides,
               mole::RoutingTable<double>& table, const Tape* tape,
               const mole::Context& context) const {
    const mole::Routing<double> routing = table.view();
    std::vector<std::vector<std::int32_t>> experts;
    std::vector<std::vector<double>> gates;
    for (Index t = 0; t < routing.tokens; ++t) {
      const auto first = routing.token_begin[t], last = routing.token_begin[t + 1];
      experts.emplace_back(routing.expert.begin() + first, routing.expert.begin() + last);
      gates.emplace_back(routing.gate.begin() + first, routing.gate.begin() + last);
    }
    for (Index t = 0; t < routing.tokens; ++t) {
      for (double& gate : gates[t]) gate *= factor(t, tokens, tape, context);
      if (defect == Defect::takes_the_higher_of_equals) {
        for (auto& e : experts[t]) e = static_cast<std::int32_t>(routing.experts - 1 - e);
      }
      if (defect == Defect::selects_nan && overrides.logit_bias.data != nullptr) {
        experts[t] = {1};
        gates[t] = {1.0};
      }
    }
    table.begin(routing.tokens);
    for (std::size_t t = 0; t < experts.size(); ++t) table.select(t, experts[t], gates[t]);
    table.finish();
  }

  static double factor(Index t, const mole::Tokens<double>& tokens, const Tape* tape,
                       const mole::Context& context) {
    switch (defect) {
      case Defect::reads_the_neighbour: return t > 0 ? 1 + tokens.x(t - 1, 0) / 8 : 1;
      case Defect::gates_depend_on_the_tape: return tape == nullptr ? 1 : 1 + 0x1p-52;
      case Defect::gates_depend_on_the_workers: return context.workers > 2 ? 1 + 0x1p-52 : 1;
      case Defect::gates_depend_on_the_instruction_set:
        return context.isa == mole::Isa::portable ? 1 + 0x1p-52 : 1;
      case Defect::spreads_nan_to_the_next_row: return t > 0 ? tokens.x(t - 1, 1) * 0 + 1 : 1;
      default: return 1;
    }
  }

  mutable std::unique_ptr<int> spilled_;
};

/// What the check of `rule` says about a router with this defect.
template <Defect defect>
std::string verdict(const std::string& rule) {
  struct Copyable : Broken<defect> {
    using Broken<defect>::Broken;
    Copyable(const Copyable& other) : Broken<defect>(other.config()) {}
  };
  static_assert(mole::Router<Copyable>);
  const Copyable router(typename Good::Config{.width = 13, .experts = 7, .k = 3});
  const test::RouterCase<Copyable> use(router, {});
  for (const auto& named : test::router_checks::all<Copyable>()) {
    if (named.rule == rule) return test::router_checks::run(named, use);
  }
  return "";
}

}  // namespace

TEST_CASE("the router contract finds a router that breaks a rule", "[contract]") {
  CHECK(verdict<Defect::takes_the_higher_of_equals>("ties go to the lower expert") != "");
  CHECK(verdict<Defect::reads_the_neighbour>("tokens do not see each other") != "");
  CHECK(verdict<Defect::gates_depend_on_the_tape>("the tape changes nothing") != "");
  CHECK(verdict<Defect::gates_depend_on_the_workers>("workers change nothing") != "");
  CHECK(verdict<Defect::spreads_nan_to_the_next_row>("non-finite rows stay alone") != "");
  CHECK(verdict<Defect::ignores_overrides>("overrides are obeyed") != "");
  CHECK(verdict<Defect::selects_nan>("non-finite logits follow the policy") != "");
  CHECK(verdict<Defect::needs_more_scratch_than_it_says>("the tape changes nothing") != "");
  CHECK(verdict<Defect::grows_the_table>("too many tokens are refused") != "");
  CHECK(verdict<Defect::wrong_gradient>("gradients are exact") != "");
  CHECK(verdict<Defect::overwrites_dx>("gradients are added") != "");
  CHECK(verdict<Defect::needs_dx>("gradients are added") != "");
  if (test::kCountsAllocations) CHECK(verdict<Defect::allocates>("nothing is allocated") != "");
  if (mole::best_isa() != mole::Isa::portable) {
    const std::string rule = "instruction sets change nothing";
    CHECK(verdict<Defect::gates_depend_on_the_instruction_set>(rule) != "");
  }
}

TEST_CASE("the router contract has nothing to say about a good router", "[contract]") {
  const Good router({.width = 13, .experts = 7, .k = 3});
  test::router_contract(router);
}

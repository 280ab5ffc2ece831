// SPDX-License-Identifier: Apache-2.0
// The skeletons keep the contracts of the library's own routers and banks.
#include "contracts/bank_contract.hpp"
#include "contracts/router_contract.hpp"
#include "skeletons/dora_bank.hpp"
#include "skeletons/expert_choice_router.hpp"
#include "skeletons/ffn_bank.hpp"
#include "skeletons/gru_router.hpp"
#include "skeletons/rank_wise.hpp"

namespace skeleton {

namespace {

/// A GruRouter that owns its cell and starts from no state: what the contract can drive.
template <class T>
class SingleGru {
 public:
  using Scalar = T;
  using Inner = GruRouter<T>;
  using Config = typename Inner::Config;
  template <class V>
  struct Params {
    typename Inner::template Params<V> all;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      Inner::template Params<V>::visit(f, p.all...);
      GruCell<V>::visit(f, p.all.cell...);
    }
    operator Params<const V>() const noexcept requires(!std::is_const_v<V>) { return {all}; }
  };
  using Prepared = typename Inner::Prepared;
  using Buffers = None;
  template <class V>
  using Carry = None;
  using Tape = typename Inner::Tape;
  static constexpr mole::Scope scope = Inner::scope;
  static constexpr mole::GradientKind gradient = Inner::gradient;

  explicit SingleGru(const Config& config) : config_(config), inner_(config) {}

  Index input_width() const noexcept { return inner_.input_width(); }
  Index experts() const noexcept { return inner_.experts(); }
  Index max_per_token() const noexcept { return inner_.max_per_token(); }
  std::size_t params_bytes() const noexcept {
    mole::ByteCounter counter;
    take_params(counter);
    return counter.bytes();
  }
  Params<T> make_params(mole::Workspace& memory) const { return take_params(memory); }
  std::size_t prepared_bytes() const noexcept { return inner_.prepared_bytes(); }
  std::size_t scratch_bytes(Index tokens, int workers) const noexcept {
    return inner_.scratch_bytes(tokens, workers);
  }
  std::size_t tape_bytes(Index tokens) const noexcept { return inner_.tape_bytes(tokens); }
  Prepared prepare(const Params<const T>& params, mole::Workspace& memory) const {
    return inner_.prepare(params.all, memory);
  }
  Tape make_tape(mole::Workspace& memory, Index tokens) const {
    return inner_.make_tape(memory, tokens);
  }
  void forward(const Prepared& prepared, None, const mole::Tokens<T>& tokens,
               const mole::Overrides<T>& overrides, None, mole::RoutingTable<T>& table, None,
               Tape* tape, const mole::Context& context) const {
    inner_.forward(prepared, {}, tokens, overrides, {}, table, {}, tape, context);
  }
  void backward(const Params<const T>& params, None, const Tape& saved,
                const mole::Tokens<T>& tokens, const mole::Overrides<T>& overrides, None,
                const mole::Routing<T>& routing, const Tape& d_tape, None, MatView<T> dx,
                const Params<T>& grad, None, const mole::Context& context) const {
    inner_.backward(params.all, {}, saved, tokens, overrides, {}, routing, d_tape, {}, dx, grad.all,
                    {}, context);
  }

 private:
  template <class Arena>
  Params<T> take_params(Arena& arena) const {
    const auto take = [&](Index rows, Index cols) { return arena.template take<T>(rows, cols); };
    const Index p = config_.state;
    return {{take(p, config_.width),
             {take(config_.experts, p), {}},
             {take(3 * p, p), take(3 * p, p), take(1, 3 * p), take(1, 3 * p)}}};
  }

  Config config_;
  Inner inner_;
};

}  // namespace

TEST_CASE("the router skeletons keep the router contract", "[skeletons]") {
  SECTION("recurrent, without carry") {
    test::router_contract(SingleGru<double>({.width = 13, .state = 5, .experts = 7, .k = 3}));
    test::router_contract(SingleGru<float>({.width = 13, .state = 5, .experts = 7, .k = 3}));
  }
  SECTION("content") {
    using Router = ContentRouter<double>;
    const test::RouterCase<Router> use(Router({.ranks = 7, .k = 3, .temperature = 0.3}), {});
    for (const auto& named : test::router_checks::all<Router>()) {
      // Ties come from parameters that are 0, and here are none; golden cases have ties in x.
      if (std::string(named.rule) == "ties go to the lower expert") continue;
      INFO(named.rule);
      CHECK(test::router_checks::run(named, use) == "");
    }
  }
  SECTION("expert choice") {
    for (const ChoiceScore score :
         {ChoiceScore::experts, ChoiceScore::tokens, ChoiceScore::selected}) {
      test::router_contract(ExpertChoiceRouter<double>(
          {.width = 13, .experts = 7, .capacity_factor = 2, .score = score}));
    }
  }
}

TEST_CASE("the bank skeletons keep the bank contract", "[skeletons]") {
  SECTION("experts on the base product") {
    test::bank_contract(DoraBank<double>(
        {.in = 11, .out = 7, .rank = {3, 2, 0, 5, 1}, .scale = {0.5, 2, 1, -0.75, 1.5}}));
  }
  SECTION("feed-forward experts") {
    test::bank_contract(FfnBank<double>({.width = 11,
                                         .inner = 7,
                                         .gate_rank = {3, 2, 0, 5},
                                         .up_rank = {1, 2, 3, 0},
                                         .down_rank = {0, 3, 2, 1},
                                         .scale = 0.5}));
  }
}

}  // namespace skeleton

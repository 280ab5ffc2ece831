// SPDX-License-Identifier: Apache-2.0
// Routers of MoFME: gates from dropout passes, and top-k that keeps equals.
#include "mole/routers/uncertainty.hpp"

#include <vector>

#include "contracts/router_table.hpp"
#include "layers/layer_trial.hpp"
#include "mole/routers/tie_top_k.hpp"

namespace {

using mole::Index;
using mole::UncertaintyGates;

template <class Keep>
void each_router(Keep keep) {
  keep(ROUTER_ROW(TieTopKRouter, .width = 13, .experts = 7, .k = 3, .bias = true));
  keep(ROUTER_ROW(TieTopKRouter, .width = 13, .experts = 7));
  keep(ROUTER_ROW(UncertaintyRouter, .width = 13, .experts = 7, .samples = 3));
  keep(ROUTER_ROW(UncertaintyRouter, .width = 13, .experts = 7, .samples = 2, .k = 3,
                  .bias = false));
}

constexpr Index kTokens = 35, kWidth = 6, kExperts = 4, kSamples = 5;

/// y: the gates and μ.
template <class T, UncertaintyGates gates>
struct Trial : test::LayerTrial<T> {
  using Router = mole::UncertaintyRouter<T>;

  Trial()
      : router({.width = kWidth,
                .experts = kExperts,
                .samples = kSamples,
                .gates = gates,
                .epsilon = T(0.125),
                .ridge = T(0.125)}) {
    params = router.make_params(this->exact(router.params_bytes()));
    grad = router.make_params(this->exact(router.params_bytes()));
    this->adopt(params, grad);
    x = this->input("x", kTokens, kWidth);
    const auto factor = this->zeros(kSamples * kTokens, kWidth);
    for (Index r = 0; r < factor.rows; ++r) {
      for (Index i = 0; i < kWidth; ++i) factor(r, i) = (r * 7 + i * 5) % 4 == 0 ? T(0) : T(1.25);
    }
    buffers.factor = factor;
    this->y = this->zeros(kTokens, 2 * kExperts);
    this->dy = this->normal(kTokens, 2 * kExperts);
    tape = router.make_tape(this->exact(router.tape_bytes(kTokens)), kTokens);
    d_tape = router.make_tape(this->exact(router.tape_bytes(kTokens)), kTokens);
    table = mole::RoutingTable<T>(this->memory, kTokens, kExperts, kExperts);
  }

  std::size_t scratch_bytes(int workers) const { return router.scratch_bytes(kTokens, workers); }
  void forward(const mole::Context& context) {
    mole::Workspace packing = this->packing(router.prepared_bytes());
    router.forward(router.prepare(params, packing), buffers, {.x = x.value}, {}, {}, table, {},
                   &tape, context);
    for (Index t = 0; t < kTokens; ++t) {
      for (Index e = 0; e < kExperts; ++e) {
        this->y(t, e) = table.view().gate[t * kExperts + e];
        this->y(t, kExperts + e) = tape.prob(t, e);
      }
    }
  }
  void backward(const mole::Context& context) {
    mole::params::zero(d_tape);
    for (Index t = 0; t < kTokens; ++t) {
      for (Index e = 0; e < kExperts; ++e) {
        d_tape.gate(0, t * kExperts + e) = this->dy(t, e);
        d_tape.prob(t, e) = this->dy(t, kExperts + e);
      }
    }
    router.backward(params, buffers, tape, {.x = x.value}, {}, {}, table.view(), d_tape, {},
                    x.gradient, grad, {}, context);
  }

  Router router;
  mole::LinearParams<T> params, grad;
  typename Router::Buffers buffers;
  typename Router::Tape tape, d_tape;
  mole::RoutingTable<T> table;
  typename test::LayerTrial<T>::Tensor x;
};
template <class T>
using MeanTrial = Trial<T, UncertaintyGates::mean>;
template <class T>
using SnrTrial = Trial<T, UncertaintyGates::snr>;
template <class T>
using WhitenTrial = Trial<T, UncertaintyGates::whiten>;

}  // namespace

TEST_CASE("MoFME's routers keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
}

TEST_CASE("MoFME's routers give the same bits on threads", "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

TEST_CASE("UncertaintyRouter: exact gradients through the statistics of the samples", "[routers]") {
  test::check_layer<MeanTrial>();
  test::check_layer<SnrTrial>();
  test::check_layer<WhitenTrial>();
}

TEST_CASE("UncertaintyRouter gives more to experts whose share is sure", "[routers]") {
  SnrTrial<double> trial;
  test::run(trial, false);
  for (Index t = 0; t < kTokens; ++t) {
    double sum = 0;
    for (Index e = 0; e < kExperts; ++e) sum += trial.y(t, e);
    CHECK(sum == Catch::Approx(1));
    for (Index a = 0; a < kExperts; ++a) {
      for (Index b = 0; b < kExperts; ++b) {
        const bool sure = trial.tape.variance(t, a) < trial.tape.variance(t, b) &&
                          trial.tape.prob(t, a) > trial.tape.prob(t, b);
        if (sure) CHECK(trial.y(t, a) > trial.y(t, b));
      }
    }
  }
}

TEST_CASE("TieTopKRouter keeps every equal of the k-th", "[routers]") {
  const mole::TieTopKRouter<double> router({.width = 1, .experts = 4, .k = 1});
  const std::vector<double> weight = {2, 1, 2, -1}, x = {1, -1};
  mole::Buffer block(std::size_t{1} << 16);
  mole::Workspace memory(block.span());
  const auto prepared = router.prepare({{weight.data(), 4, 1}, {}}, memory);
  mole::RoutingTable<double> table(memory, 2, 4, 4);
  router.forward(prepared, {}, {.x = {x.data(), 2, 1}}, {}, {}, table, {}, nullptr,
                 mole::Context{memory});
  const auto routing = table.view();
  CHECK(std::vector<int>(routing.expert.begin(), routing.expert.end()) ==
        std::vector<int>{0, 2, 3});
  CHECK(std::vector<double>(routing.gate.begin(), routing.gate.end()) ==
        std::vector<double>{0.5, 0.5, 1});
}

TEST_CASE("MoFME's routers refuse what does not fit", "[routers]") {
  MeanTrial<double> trial;
  trial.buffers.factor = trial.buffers.factor.row_block(0, 3);
  CHECK_THROWS_WITH(test::run(trial, false), "buffers.factor: expected [175, 6], got [3, 6]");
  using Router = mole::UncertaintyRouter<double>;
  CHECK_THROWS_WITH(
      Router({.width = 3, .experts = 2, .samples = 1, .gates = UncertaintyGates::snr}),
      "UncertaintyRouter: samples: expected at least 2, got 1");
  CHECK_THROWS_WITH(mole::TieTopKRouter<double>({.width = 3, .experts = 2, .k = 3}),
                    "TieTopKRouter: k: expected 0 ... experts, got 3");
}

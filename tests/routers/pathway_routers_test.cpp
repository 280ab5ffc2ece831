// SPDX-License-Identifier: Apache-2.0
// Routers that decide by phase, by sequence, by context or by a given pathway.
#include <vector>

#include "contracts/router_table.hpp"
#include "layers/layer_trial.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/routers/lora_mixer.hpp"
#include "mole/routers/mova.hpp"
#include "mole/routers/pathway.hpp"
#include "mole/routers/sequence.hpp"

namespace {

using mole::Index;
using mole::MatView;
using mole::None;

/// A router driven without what it could carry: what the contract can drive.
template <class R>
class WithoutCarry : public R {
 public:
  using T = typename R::Scalar;
  template <class V>
  using Carry = None;
  using R::R;

  void forward(const typename R::Prepared& prepared, const typename R::Buffers& buffers,
               const mole::Tokens<T>& tokens, const mole::Overrides<T>& overrides, None,
               mole::RoutingTable<T>& table, None, typename R::Tape* tape,
               const mole::Context& context) const {
    R::forward(prepared, buffers, tokens, overrides, {}, table, {}, tape, context);
  }
  void backward(const typename R::template Params<const T>& params,
                const typename R::Buffers& buffers, const typename R::Tape& saved,
                const mole::Tokens<T>& tokens, const mole::Overrides<T>& overrides, None,
                const mole::Routing<T>& routing, const typename R::Tape& d_tape, None,
                MatView<T> dx, const typename R::template Params<T>& grad, None,
                const mole::Context& context) const {
    R::backward(params, buffers, saved, tokens, overrides, {}, routing, d_tape, {}, dx, grad, {},
                context);
  }
};

}  // namespace

namespace mole {
template <class T>
using MovaWithoutContext = WithoutCarry<MovaRouter<T>>;
template <class T>
using PathwayOfZeros = WithoutCarry<PathwayRouter<T>>;
}  // namespace mole

namespace {

template <class Keep>
void each_router(Keep keep) {
  keep(ROUTER_ROW(LoraMixerRouter, .width = 13, .experts = 7, .bias = true));
  keep(ROUTER_ROW(LoraMixerRouter, .width = 13, .experts = 7, .phase = mole::MixerPhase::top_k,
                  .k = 3, .renormalise = false));
  keep(ROUTER_ROW(SequenceRouter, .width = 13, .experts = 7));
  keep(ROUTER_ROW(SequenceRouter, .width = 13, .experts = 7, .k = 3, .pool = mole::Pool::last,
                  .bias = true));
  keep(ROUTER_ROW(MovaWithoutContext, .width = 13, .experts = 7, .hidden = 5, .k = 2));
  keep(ROUTER_ROW(PathwayOfZeros, .width = 13, .experts = 7, .k = 2, .bias = true));
}

constexpr Index kTokens = 17, kWidth = 5, kOut = 4, kExperts = 6, kContext = 3;

/// A mixture of LoRA experts behind a router that is given something by its carry.
template <class Router>
struct CarryTrial : test::LayerTrial<typename Router::Scalar> {
  using T = typename Router::Scalar;
  using Mixture = mole::Mixture<Router, mole::LoraBank<T>>;

  explicit CarryTrial(const Router& router)
      : layer(router, mole::LoraBank<T>({.in = kWidth,
                                         .out = kOut,
                                         .rank = std::vector<Index>(kExperts, 2),
                                         .scale = std::vector<T>(kExperts, T(1.5))})) {
    params.router = router.make_params(this->memory);
    grad.router = router.make_params(this->memory);
    params.experts = layer.experts().template make_params<T>(this->memory);
    grad.experts = layer.experts().template make_params<T>(this->memory);
    this->adopt(params, grad);
    x = this->input("x", kTokens, kWidth);
    this->y = this->zeros(kTokens, kOut);
    this->dy = this->normal(kTokens, kOut);
    tape = layer.make_tape(this->exact(layer.tape_bytes(kTokens)), kTokens);
    d_tape = router.make_tape(this->exact(router.tape_bytes(kTokens)), kTokens);
  }

  mole::LayerInput<T> layer_input() const {
    mole::LayerInput<T> input(x.value);
    input.sequence_begin = begin;
    input.mask = mask;
    return input;
  }
  std::size_t scratch_bytes(int workers) const { return layer.scratch_bytes(kTokens, workers); }
  void forward(const mole::Context& context) {
    mole::Workspace packing = this->packing(layer.prepared_bytes());
    mole::rows::fill(this->y, 0);
    const typename Mixture::Weights weights{params.router, params.experts};
    layer.forward(layer.prepare(weights, packing), buffers, layer_input(), carry, this->y, {},
                  &tape, context);
  }
  void backward(const mole::Context& context) {
    mole::params::zero(d_tape);
    const typename Mixture::Weights weights{params.router, params.experts};
    layer.backward(weights, buffers, tape, layer_input(), carry, this->dy, d_tape, {},
                   {.x = x.gradient}, grad, d_carry, context);
  }

  Mixture layer;
  typename Mixture::template Params<T> params{}, grad{};
  typename Mixture::Tape tape;
  typename Router::Tape d_tape;
  typename Router::Buffers buffers = {};
  typename Router::template Carry<const T> carry;
  typename Router::template Carry<T> d_carry;
  typename test::LayerTrial<T>::Tensor x;
  std::vector<std::int32_t> begin = {};
  std::vector<std::uint8_t> mask = {};
};

/// Sequences of 5, 0, 9 and 3 tokens, some of them padding.
template <class T>
struct MovaTrial : CarryTrial<mole::MovaRouter<T>> {
  MovaTrial()
      : CarryTrial<mole::MovaRouter<T>>(mole::MovaRouter<T>(
            {.width = kWidth, .experts = kExperts, .context = kContext, .hidden = 4, .k = 3})) {
    const auto context = this->input("context", 4, kContext);
    this->carry = {context.value};
    this->d_carry = {context.gradient};
    this->begin = {0, 5, 5, 14, 17};
    this->mask = {1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1};
  }
};

template <class T, mole::PathwayGates gates, bool renormalise>
struct PathwayTrial : CarryTrial<mole::PathwayRouter<T>> {
  PathwayTrial()
      : CarryTrial<mole::PathwayRouter<T>>(mole::PathwayRouter<T>({.width = kWidth,
                                                                   .experts = kExperts,
                                                                   .k = 2,
                                                                   .renormalise = renormalise,
                                                                   .gates = gates,
                                                                   .floor = T(0.125)})) {
    const auto pathway = this->input("pathway", 1, kExperts);
    for (Index e = 0; e < kExperts; ++e) pathway.value(0, e) = T(1) / static_cast<T>(e + 1);
    if (gates == mole::PathwayGates::top_core) {  // so that one outside the core is chosen
      for (const Index e : {Index{1}, Index{3}, Index{4}}) pathway.value(0, e) = T(-0.5);
    }
    this->carry = {pathway.value};
    this->d_carry = {pathway.gradient};
    for (Index t = 0; t < kTokens; ++t) rows.push_back(t % 3 == 1);
    this->buffers = {rows, core};
  }
  std::vector<std::uint8_t> rows, core = {1, 1, 0, 1, 1, 0};
};
template <class T>
using SharesTrial = PathwayTrial<T, mole::PathwayGates::shares, false>;
template <class T>
using RenormalisedTrial = PathwayTrial<T, mole::PathwayGates::shares, true>;
template <class T>
using CoreTrial = PathwayTrial<T, mole::PathwayGates::core, false>;
template <class T>
using TopCoreTrial = PathwayTrial<T, mole::PathwayGates::top_core, false>;

}  // namespace

TEST_CASE("Routers by phase, sequence and pathway keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
}

TEST_CASE("Routers by phase, sequence and pathway give the same bits on threads",
          "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

TEMPLATE_TEST_CASE("LoraMixerRouter keeps the contract in its hard phase", "[routers]", float,
                   double) {
  test::router_contract(
      mole::LoraMixerRouter<TestType>(
          {.width = 13, .experts = 7, .phase = mole::MixerPhase::hard, .bias = true}),
      {.by_score = false});
}

TEST_CASE("MovaRouter: gradients by x, context and parameters", "[routers]") {
  test::check_layer<MovaTrial>();
}

TEST_CASE("PathwayRouter: gradients by x, the pathway and parameters", "[routers]") {
  test::check_layer<SharesTrial>();
  test::check_layer<RenormalisedTrial>();
  test::check_layer<CoreTrial>();
  test::check_layer<TopCoreTrial>();
}

TEST_CASE("the tokens of a sequence share one decision, whatever the others do", "[routers]") {
  MovaTrial<double> trial;
  test::run(trial, false);
  const auto routing = trial.tape.routing.view();
  const auto gates = [&](Index t) {
    const auto first = routing.token_begin[t], last = routing.token_begin[t + 1];
    return std::vector<double>(routing.gate.begin() + first, routing.gate.begin() + last);
  };
  for (const Index t : {Index{6}, Index{13}}) CHECK(gates(t) == gates(5));
  CHECK(gates(4) != gates(5));
  const auto before = gates(16);
  trial.x.value(4, 0) += 7;  // padding
  trial.x.value(7, 0) += 1;
  test::run(trial, false);
  CHECK(gates(16) == before);
  CHECK(gates(4) == gates(0));
}

TEST_CASE("pathway routers refuse shapes that do not fit", "[routers]") {
  CoreTrial<double> trial;
  trial.core.pop_back();
  trial.buffers.core = trial.core;
  CHECK_THROWS_WITH(test::run(trial, false), "buffers.core: expected 6 experts, got 5");
  MovaTrial<double> mova;
  mova.begin.pop_back();
  CHECK_THROWS_AS(test::run(mova, false), mole::Error);
  mova.begin = {0, 17};
  CHECK_THROWS_WITH(test::run(mova, false), "carry_in.context: expected [1, 3], got [4, 3]");
  CHECK_THROWS_WITH(mole::SequenceRouter<double>({.width = 3, .experts = 2, .k = 3}),
                    "SequenceRouter: k: expected 1 ... experts, got 3");
  CHECK_THROWS_WITH(mole::PathwayRouter<double>({.width = 3, .experts = 2, .floor = -1}),
                    "PathwayRouter: floor: expected a number from 0 up, got -1");
}

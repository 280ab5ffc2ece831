// SPDX-License-Identifier: Apache-2.0
// Ways of routing that need no router of their own: docs/routers.md, "Patterns".
#include <algorithm>
#include <vector>

#include "contracts/router_case.hpp"
#include "layers/layer_case.hpp"
#include "mole/losses/excess_balance.hpp"
#include "mole/losses/supervised.hpp"
#include "mole/routers/hash.hpp"
#include "mole/routers/task.hpp"
#include "support/catch.hpp"

namespace {

using mole::Index;
using test::LayerCase;
using test::Matrix;

constexpr Index kIn = 6, kOut = 4, kTokens = 9;

/// Σ gate · f_e(x), in the order of the slots, by the experts of the case.
template <class Case>
double expected(const Case& c, const Matrix<double>& x, Index t, Index o) {
  const auto routing = c.tape.routing.view();
  const auto& config = c.layer.experts().config();
  double sum = 0;
  for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
    const Index e = routing.expert[s];
    const auto down = c.params.experts.down_of(e), up = c.params.experts.up_of(e);
    for (Index r = 0; r < config.rank[e]; ++r) {
      double hidden = 0;
      for (Index i = 0; i < kIn; ++i) hidden += down(r, i) * x(t, i);
      sum += routing.gate[s] * config.scale[e] * up(o, r) * hidden;
    }
  }
  return sum;
}

}  // namespace

TEST_CASE("An expert of rank 0 takes a slot and does nothing", "[layers]") {
  mole::LoraBank<double>::Config config;
  config.in = kIn;
  config.out = kOut;
  config.rank = {2, 2, 0, 0};
  config.scale = {1, 1, 1, 1};
  const mole::TopKRouter<double> router({.width = kIn, .experts = 4, .k = 2});
  LayerCase c(test::TopKMixture<double>{router, mole::LoraBank<double>(config)}, kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 3);
  const auto y = c.record(x, Matrix<double>(kTokens, kOut));
  const auto routing = c.tape.routing.view();
  int without = 0, both = 0;
  for (Index t = 0; t < kTokens; ++t) {
    REQUIRE(routing.token_begin[t + 1] - routing.token_begin[t] == 2);
    const Index first = routing.token_begin[t];
    const int real = (routing.expert[first] < 2) + (routing.expert[first + 1] < 2);
    without += real == 0;
    both += real == 2;
    for (Index o = 0; o < kOut; ++o) {
      if (real == 0) CHECK(y(t, o) == 0);
      CHECK(y(t, o) == Catch::Approx(expected(c, x, t, o)).margin(1e-14));
    }
  }
  CHECK(without > 0);
  CHECK(both < kTokens);
}

TEST_CASE("A coarse mask limits the experts among which the fine gate chooses", "[layers]") {
  const mole::TopKRouter<double> router({.width = kIn, .experts = 6, .k = 2});
  LayerCase c(test::TopKMixture<double>{router, test::make_bank<double>(kIn, kOut, 6)}, kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 3);
  // Group 0 (experts 0 ... 2) or 1 (experts 3 ... 5) by the parity of the token; token 4: none.
  const Matrix<std::uint8_t> forbidden(kTokens, 6,
                                       [](Index t, Index e) { return t == 4 || e / 3 != t % 2; });
  mole::LayerInput<double> input(x);
  input.overrides.forbidden = forbidden;
  const auto y = c.record(input, Matrix<double>(kTokens, kOut));
  const auto routing = c.tape.routing.view();
  for (Index t = 0; t < kTokens; ++t) {
    const Index first = routing.token_begin[t], last = routing.token_begin[t + 1];
    CHECK(last - first == (t == 4 ? 0 : 2));
    double sum = 0;
    for (Index s = first; s < last; ++s) {
      CHECK(routing.expert[s] / 3 == t % 2);
      sum += routing.gate[s];
    }
    if (t != 4) CHECK(sum == Catch::Approx(1));
    for (Index o = 0; o < kOut; ++o) {
      CHECK(y(t, o) == Catch::Approx(expected(c, x, t, o)).margin(1e-14));
    }
  }
}

TEST_CASE("A map from domains to experts is a table of a hash router", "[layers]") {
  using Router = mole::HashRouter<double>;
  const std::vector<std::int32_t> map = {2, 0, 1, 3};  // domain 0: experts 2, 0; domain 1: 1, 3
  const Router router({.width = kIn, .experts = 4, .k = 2});
  LayerCase c(mole::Mixture{router, test::make_bank<double>(kIn, kOut, 4)}, kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 3);
  std::vector<std::int32_t> domains;
  for (Index t = 0; t < kTokens; ++t) domains.push_back(static_cast<std::int32_t>(t % 2));
  mole::LayerInput<double> input(x);
  input.ids = domains;
  Router::Buffers buffers;
  buffers.table = {map.data(), 2, 2};
  const auto y = c.record(input, Matrix<double>(kTokens, kOut), buffers);
  const auto routing = c.tape.routing.view();
  for (Index t = 0; t < kTokens; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      CHECK((routing.expert[s] % 2 == 0) == (t % 2 == 0));
      CHECK(routing.gate[s] == 0.5);
    }
    for (Index o = 0; o < kOut; ++o) {
      CHECK(y(t, o) == Catch::Approx(expected(c, x, t, o)).margin(1e-14));
    }
  }
}

namespace {

/// StableMoE: a mixture whose router chooses first, and a light router on the word alone that
/// learns its choices and then chooses for it.
struct TwoStages {
  static constexpr Index kExperts = 4, kWords = 12, kMany = 48;
  static constexpr double kRate = 0.5;
  using Light = mole::TaskRouter<double>;
  using LightCall = test::RouterCall<Light>;

  LayerCase<test::TopKMixture<double>> layer{
      {mole::TopKRouter<double>({.width = kIn,
                                 .experts = kExperts,
                                 .k = 1,
                                 .score = mole::Score::sigmoid,
                                 .renormalise = false}),
       mole::LoraBank<double>(
           {.in = kIn, .out = kOut, .rank = {2, 2, 2, 2}, .scale = {1, 1, 1, 1}})},
      kMany};
  test::RouterCase<Light> light{
      Light({.width = kIn, .experts = kExperts, .tasks = kWords, .task_width = 5, .k = 1}), {}};
  test::RouterProblem<double> words = light.problem(kMany);
  Matrix<double> x, wanted;

  TwoStages() {
    const auto of_word = test::normal_matrix<double>(kWords, kIn, 3);
    const auto noise = test::normal_matrix<double>(kMany, kIn, 4);
    const auto answer = test::normal_matrix<double>(kWords, kOut, 5);
    for (Index t = 0; t < kMany; ++t) words.ids[t] = static_cast<std::int32_t>(t * 5 % kWords);
    x = Matrix<double>(kMany, kIn, [&](Index t, Index i) {
      return of_word(words.ids[t], i) + 0.02 * noise(t, i);
    });
    wanted = Matrix<double>(kMany, kOut, [&](Index t, Index o) { return answer(words.ids[t], o); });
  }

  /// One step of everything that learns; the mean squared error of the layer before it.
  double step(const mole::LayerInput<double>& input, bool stage1) {
    const auto y = layer.record(input, Matrix<double>(kMany, kOut));
    const Matrix<double> dy(kMany, kOut, [&](Index t, Index o) {
      return (y(t, o) - wanted(t, o)) / static_cast<double>(kMany);
    });
    mole::params::zero(layer.d_tape);
    if (stage1) {
      const auto routing = layer.tape.routing.view();
      mole::excess_balance_loss<double>(0.3 / kMany, routing, layer.d_tape.gate, layer.context);
      distil(routing.expert);
    }
    layer.backward(input, dy.view(), {});
    mole::params::zip([](double& value, const double& d) { value -= kRate * d; }, layer.params,
                      layer.grad);
    layer.prepare();
    return test::weighted_sum(dy, dy) * static_cast<double>(kMany);
  }

  /// The light router learns these choices.
  void distil(std::span<const std::int32_t> choice) {
    LightCall call(light, words);
    call.forward();
    mole::params::zero(call.d_tape());
    mole::domain_loss<double>(1, call.tape().logits.row_block(0, kMany), choice,
                              call.d_tape().logits.row_block(0, kMany), layer.context);
    call.backward();
    const auto d = call.gradient().params;
    std::size_t n = 0;
    mole::params::zip([&](double& value) { value -= 4 * kRate * d[n++]; }, light.params);
    light.prepare();
  }

  /// What the light router chooses for every word: all that is left of it in stage 2.
  std::vector<std::int32_t> frozen_choice() const {
    test::RouterProblem<double> all = light.problem(kWords);
    LightCall call(light, all);
    call.forward(false);
    return {call.routing.expert.begin(), call.routing.expert.end()};
  }
};

}  // namespace

TEST_CASE("Stage 1 of a stable routing balances the experts and is learnt by a router on words",
          "[layers]") {
  TwoStages stages;
  const mole::LayerInput<double> input(stages.x.view());
  const double first = stages.step(input, true);
  double last = first;
  for (int n = 0; n < 400; ++n) last = stages.step(input, true);
  CHECK(last < first / 2);
  const auto routing = stages.layer.tape.routing.view();
  std::vector<int> load(TwoStages::kExperts);
  for (const std::int32_t e : routing.expert) ++load[e];
  CHECK(*std::max_element(load.begin(), load.end()) < TwoStages::kMany / 2);
  const auto table = stages.frozen_choice();
  REQUIRE(table.size() == TwoStages::kWords);
  int agreed = 0;
  for (Index t = 0; t < TwoStages::kMany; ++t) {
    agreed += table[stages.words.ids[t]] == routing.expert[t];
  }
  CHECK(agreed >= 46);
}

TEST_CASE("Stage 2 of a stable routing keeps the choices while gates and experts go on learning",
          "[layers]") {
  TwoStages stages;
  const mole::LayerInput<double> unforced(stages.x.view());
  for (int n = 0; n < 50; ++n) stages.step(unforced, true);
  const auto table = stages.frozen_choice();
  std::vector<std::int32_t> forced;
  for (const std::int32_t word : stages.words.ids) forced.push_back(table[word]);
  mole::LayerInput<double> input(stages.x.view());
  input.overrides.forced = forced;

  auto& layer = stages.layer;
  const auto gates_are_sigmoids = [&] {
    const auto routing = layer.tape.routing.view();
    REQUIRE(std::equal(forced.begin(), forced.end(), routing.expert.begin(), routing.expert.end()));
    for (Index t = 0; t < TwoStages::kMany; ++t) {
      double logit = 0;
      for (Index i = 0; i < kIn; ++i) {
        logit += layer.params.router.weight(forced[t], i) * stages.x(t, i);
      }
      CHECK(routing.gate[t] == Catch::Approx(1 / (1 + std::exp(-logit))));
    }
  };
  const double first = stages.step(input, false);
  double last = first;
  for (int n = 0; n < 100; ++n) last = stages.step(input, false);
  CHECK(last < 0.9 * first);

  const auto dy = test::normal_matrix<double>(TwoStages::kMany, kOut, 7);
  const Matrix<double> y0(TwoStages::kMany, kOut);
  layer.record(input, y0);
  gates_are_sigmoids();
  mole::params::zero(layer.d_tape);
  layer.backward(input, dy.view(), {});
  const auto value = [&] {
    layer.prepare();
    return test::weighted_sum(dy, layer.infer(input, y0));
  };
  const auto weight = layer.params.router.weight;
  CHECK(mole::params::norm(layer.grad.router) > 0.01);
  CHECK(test::gradient_error(weight, layer.grad.router.weight, value) == "");

  for (Index e = 0; e < TwoStages::kExperts; ++e) {
    for (double& w : weight.row(e)) w = -w;
  }
  layer.prepare();
  layer.record(input, y0);
  gates_are_sigmoids();
  layer.record(unforced, y0);
  const auto chosen = layer.tape.routing.view().expert;
  CHECK_FALSE(std::equal(forced.begin(), forced.end(), chosen.begin(), chosen.end()));
}

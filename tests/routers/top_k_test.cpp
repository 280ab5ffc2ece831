// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/top_k.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "contracts/router_contract.hpp"
#include "support/reference.hpp"

namespace {

using mole::Index;
using mole::Score;
using mole::TopKRouter;
using test::Matrix;
template <class T>
using Order = typename TopKRouter<T>::Order;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
std::vector<TopKRouter<T>> routers() {
  using R = TopKRouter<T>;
  constexpr auto kAfter = Order<T>::topk_then_score;
  return {
      R({.width = 13, .experts = 7, .k = 3}),
      R({.width = 13, .experts = 7, .k = 3, .renormalise = false, .temperature = T(0.75)}),
      R({.width = 13, .experts = 7, .k = 2, .order = kAfter, .renormalise = false, .bias = true}),
      R({.width = 5, .experts = 5, .k = 5, .scale = T(2.5)}),
      R({.width = 7, .experts = 5, .k = 1, .score = Score::sigmoid, .renormalise = false}),
      R({.width = 7, .experts = 5, .k = 2, .score = Score::sigmoid, .probes = true}),
      R({.width = 7,
         .experts = 5,
         .k = 3,
         .score = Score::sqrt_softplus,
         .renorm_epsilon = T(1e-3)}),
      R({.width = 7, .experts = 5, .k = 3, .score = Score::sqrt_softplus, .order = kAfter}),
      R({.width = 3, .experts = 67, .k = 3, .temperature = T(2), .probes = true}),
  };
}

/// The gates of one token with these logits, through an identity as weight.
template <class T>
struct OneToken {
  OneToken(typename TopKRouter<T>::Config config, const std::vector<T>& logits,
           std::vector<T> selection_bias = {})
      : router(with_size(config, logits.size())),
        bias(std::move(selection_bias)),
        use(router, {.buffers = {bias}}),
        problem(use.problem(1)) {
    Index i = 0;
    const auto n = static_cast<Index>(logits.size());
    use.fill_params([&] { return T(i++ % (n + 1) == 0); });
    for (Index e = 0; e < n; ++e) problem.x(0, e) = 0;
    problem.logit_bias = Matrix<T>(1, n, [&](Index, Index e) { return logits[e]; });
    decision = test::decide(use, problem);
  }

  static auto with_size(typename TopKRouter<T>::Config config, std::size_t experts) {
    config.width = config.experts = static_cast<Index>(experts);
    return config;
  }
  const std::vector<std::int32_t>& experts() const { return decision.experts[0]; }
  const std::vector<T>& gates() const { return decision.gates[0]; }
  auto gradient() const { return test::differentiate(use, problem); }

  TopKRouter<T> router;
  std::vector<T> bias;
  test::RouterCase<TopKRouter<T>> use;
  test::RouterProblem<T> problem;
  test::Decision<T> decision;
};

using Experts = std::vector<std::int32_t>;

template <class T>
void check_against_reference(const TopKRouter<T>& router, const std::vector<T>& selection_bias,
                             test::Close close) {
  using test::reference::row_of;
  const auto& config = router.config();
  test::RouterCase<TopKRouter<T>> use(router, {.buffers = {selection_bias}});
  const auto problem = use.problem(9);
  Matrix<double> weight;
  std::vector<double> bias;
  const auto read = [&](const mole::Leaf& leaf, const auto& view) {
    if (leaf.name == "weight") {
      weight = Matrix<double>(view.rows, view.cols, [&](Index r, Index c) { return view(r, c); });
    } else {
      for (Index c = 0; c < view.cols; ++c) bias.push_back(view(0, c));
    }
  };
  mole::LinearParams<T>::visit(read, use.params);

  test::reference::TopK expected;
  expected.k = static_cast<std::size_t>(config.k);
  expected.kind = static_cast<test::reference::Score>(config.score);
  expected.score_first = config.order == Order<T>::score_then_topk;
  expected.renormalise = config.renormalise;
  expected.epsilon = config.renorm_epsilon;
  expected.temperature = config.temperature;
  expected.scale = config.scale;
  expected.selection_bias.assign(selection_bias.begin(), selection_bias.end());
  const auto logits = test::reference::logits(test::converted<double>(problem.x), weight, bias);
  const auto decision = test::decide(use, problem);
  CHECK(test::difference(decision.logits, logits, close) == "");
  for (Index t = 0; t < 9; ++t) {
    auto chosen = expected.select(row_of(logits, t));
    const auto gates = expected.gates(row_of(logits, t), chosen);
    std::sort(chosen.begin(), chosen.end());
    INFO("token " << t);
    CHECK(decision.active(t) == chosen);
    for (std::size_t i = 0; i < decision.experts[t].size(); ++i) {
      const double want = gates[decision.experts[t][i]];
      CHECK(std::fabs(decision.gates[t][i] - want) <= close.abs + close.rel * want);
    }
  }
}

}  // namespace

TEST_CASE("TopKRouter keeps the router contract", "[routers]") {
  for (const auto& router : routers<float>()) test::router_contract(router);
  for (const auto& router : routers<double>()) test::router_contract(router);
}

TEST_CASE("TopKRouter keeps the router contract with a selection bias", "[routers]") {
  const std::vector<double> bias = {0.1, -0.2, 0.3, 0.05, -0.1};
  const TopKRouter<double> after(
      {.width = 7, .experts = 5, .k = 2, .order = Order<double>::topk_then_score});
  const TopKRouter<double> sigmoid({.width = 7, .experts = 5, .k = 2, .score = Score::sigmoid});
  for (const auto& router : {after, sigmoid}) {
    const test::RouterCase<TopKRouter<double>> use(router, {.buffers = {bias}});
    for (const auto& named : test::router_checks::all<TopKRouter<double>>()) {
      if (named.rule == std::string("ties go to the lower expert")) continue;  // none are equal
      INFO(named.rule);
      CHECK(test::router_checks::run(named, use) == "");
    }
  }
}

TEST_CASE("TopKRouter gives the same bits on every thread", "[routers][threads]") {
  test::router_threads_contract(TopKRouter<float>({.width = 13, .experts = 67, .k = 3}));
  test::router_threads_contract(TopKRouter<double>({.width = 13, .experts = 7, .k = 3}));
}

TEST_CASE("TopKRouter computes what plain loops compute", "[routers]") {
  const test::Close in_double{1e-12, 1e-13}, in_float{2e-5, 2e-6};
  for (const auto& router : routers<double>()) check_against_reference(router, {}, in_double);
  for (const auto& router : routers<float>()) check_against_reference(router, {}, in_float);
  for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
    for (const auto order : {Order<double>::score_then_topk, Order<double>::topk_then_score}) {
      for (const bool renormalise : {false, true}) {
        const TopKRouter<double> router({.width = 131,
                                         .experts = 67,
                                         .k = 5,
                                         .score = score,
                                         .order = order,
                                         .renormalise = renormalise,
                                         .renorm_epsilon = renormalise ? 0.01 : 0.0,
                                         .temperature = 0.7,
                                         .scale = 1.5,
                                         .bias = true});
        std::vector<double> bias;
        for (int e = 0; e < 67; ++e) bias.push_back(0.02 * ((e * 29) % 13));
        check_against_reference(router, {}, in_double);
        check_against_reference(router, bias, in_double);
      }
    }
  }
}

TEST_CASE("one selected expert that is renormalised has gate `scale` and no gradient",
          "[routers]") {
  for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
    const TopKRouter<float> router(
        {.width = 13, .experts = 7, .k = 1, .score = score, .scale = 2.5f});
    const test::RouterCase<TopKRouter<float>> use(router, {});
    const auto problem = use.problem(5);
    test::RouterCall<TopKRouter<float>> call(use, problem);
    call.forward();
    call.set_upstream();
    for (auto view : {call.d_tape().prob, call.d_tape().logits}) {
      std::fill_n(view.data, view.size(), 0.0f);
    }
    call.backward();
    for (const float gate : call.routing.gate) CHECK(gate == 2.5f);
    for (const float d : call.gradient().params) CHECK(d == 0);
  }
}

TEST_CASE("experts are ranked by logits where every score underflows", "[routers]") {
  const std::vector<float> low = {-800, -300, -299, -301}, high = {790, 800, 799, -800};
  for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
    const OneToken<float> a({.k = 2, .score = score}, low), b({.k = 2, .score = score}, high);
    CHECK(a.experts() == Experts{1, 2});
    CHECK(b.experts() == Experts{1, 2});
    CHECK(a.gates()[0] + a.gates()[1] == Catch::Approx(1));
    CHECK(a.gates()[1] > a.gates()[0]);
    const auto gradient = a.gradient();
    for (const float d : gradient.dlogits.view().row(0)) CHECK(std::isfinite(d));
  }
  const float share = 1 / (1 + std::exp(1.0f));
  CHECK(OneToken<float>({.k = 2, .score = Score::sigmoid}, low).gates()[0] == Catch::Approx(share));
  CHECK(OneToken<float>({.k = 2}, high).gates()[1] == Catch::Approx(share));
}

TEST_CASE("scores that round to the same number are still ranked", "[routers]") {
  CHECK(OneToken<float>({.k = 1, .score = Score::sigmoid}, {40, 41, 42}).experts() == Experts{2});
}

TEST_CASE("the selection bias selects but does not weigh", "[routers]") {
  const std::vector<double> logits = {1, 0.5, 0}, bias = {-9, 0, 0};
  const OneToken<double> plain({.k = 2, .renormalise = false}, logits);
  const OneToken<double> biased({.k = 2, .renormalise = false}, logits, bias);
  CHECK(plain.experts() == Experts{0, 1});
  CHECK(biased.experts() == Experts{1, 2});
  CHECK(biased.gates()[0] == plain.gates()[1]);
}

TEST_CASE("the selection bias is added to what the order ranks", "[routers]") {
  const std::vector<double> logits = {3, 0, -3}, bias = {0, 0, 0.99};
  CHECK(OneToken<double>({.k = 1}, logits, bias).experts() == Experts{2});
  CHECK(
      OneToken<double>({.k = 1, .order = Order<double>::topk_then_score}, logits, bias).experts() ==
      Experts{0});
}

TEST_CASE("+inf takes the whole weight, several share it", "[routers]") {
  for (const Score score : {Score::softmax, Score::sqrt_softplus}) {
    for (const auto order : {Order<double>::score_then_topk, Order<double>::topk_then_score}) {
      for (const bool renormalise : {false, true}) {
        const TopKRouter<double>::Config config{
            .k = 3, .score = score, .order = order, .renormalise = renormalise};
        const OneToken<double> one(config, {0, kInfinity, 1, 2});
        CHECK(one.experts() == Experts{1, 2, 3});
        CHECK(one.gates() == std::vector<double>{1, 0, 0});
        const OneToken<double> two(config, {kInfinity, 0, 1, kInfinity});
        CHECK(two.experts() == Experts{0, 2, 3});
        CHECK(two.gates() == std::vector<double>{0.5, 0, 0.5});
      }
    }
  }
  const OneToken<double> sigmoid({.k = 1, .score = Score::sigmoid, .renormalise = false},
                                 {0, kInfinity, 1});
  CHECK(sigmoid.experts() == Experts{1});
  CHECK(sigmoid.gates() == std::vector<double>{1});
}

TEST_CASE("fewer available experts than k get fewer slots", "[routers]") {
  const double kNan = std::numeric_limits<double>::quiet_NaN();
  const OneToken<double> two({.k = 3}, {kNan, 0, -kInfinity, 0});
  CHECK(two.experts() == Experts{1, 3});
  CHECK(two.gates() == std::vector<double>{0.5, 0.5});
  CHECK(OneToken<double>({.k = 3}, {kNan, kNan, kNan, kNan}).experts().empty());
}

TEST_CASE("probes are the available experts that are not selected", "[routers]") {
  const std::vector<double> logits = {3, 1, -kInfinity, 2};
  const OneToken<double> plain({.k = 2}, logits), probed({.k = 2, .probes = true}, logits);
  CHECK(probed.experts() == Experts{0, 1, 3});
  CHECK(probed.gates() == std::vector<double>{plain.gates()[0], 0, plain.gates()[1]});
  CHECK(test::bits_of(test::Gradient<double>{{}, probed.gradient().dlogits, {}},
                      test::Gradient<double>{{}, plain.gradient().dlogits, {}}) == "");
}

TEST_CASE("an expert whose weights are not finite leaves the gradients of the others alone",
          "[routers]") {
  const TopKRouter<double> router({.width = 5, .experts = 4, .k = 2});
  test::RouterCase<TopKRouter<double>> use(router, {});
  use.params.weight(1, 3) = std::numeric_limits<double>::quiet_NaN();
  use.prepare();
  const auto problem = use.problem(6);
  const auto decision = test::decide(use, problem);
  for (const auto& experts : decision.experts) CHECK(experts.size() == 2);
  const auto gradient = test::differentiate(use, problem);
  for (Index t = 0; t < 6; ++t) {
    CHECK(!test::router_checks::has_expert(decision, t, 1));
    for (const double d : gradient.dx.view().row(t)) CHECK(std::isfinite(d));
  }
}

TEST_CASE("TopKRouter names the field of a bad configuration", "[routers]") {
  using R = TopKRouter<float>;
  const auto message = [](const R::Config& config) -> std::string {
    try {
      R router(config);
    } catch (const mole::Error& error) {
      CHECK(error.code() == mole::Errc::invalid_argument);
      return error.what();
    }
    return "accepted";
  };
  CHECK(message({.width = 1, .experts = 1, .k = 1, .renorm_epsilon = 0, .scale = -1}) ==
        "accepted");
  CHECK(message({.width = 0, .experts = 4}) == "TopKRouter: width: expected at least 1, got 0");
  CHECK(message({.width = 3, .experts = 0}) == "TopKRouter: experts: expected at least 1, got 0");
  CHECK(message({.width = 3, .experts = 4, .k = 4}) == "accepted");
  for (const Index k : {0, 5}) {
    CHECK(message({.width = 3, .experts = 4, .k = k}) ==
          "TopKRouter: k: expected 1 ... experts, got " + std::to_string(k));
  }
  const float kNan = std::nanf("");
  const std::vector<std::pair<float, std::string>> bad = {
      {kNan, "nan"}, {INFINITY, "inf"}, {-INFINITY, "-inf"}, {-1.0f, "-1"}, {0.0f, "0"}};
  for (const auto& [value, text] : bad) {
    CHECK(message({.width = 3, .experts = 4, .temperature = value}) ==
          "TopKRouter: temperature: expected a positive number, got " + text);
    if (value == 0) continue;
    CHECK(message({.width = 3, .experts = 4, .renorm_epsilon = value}) ==
          "TopKRouter: renorm_epsilon: expected a number from 0 up, got " + text);
    if (value == -1) continue;
    CHECK(message({.width = 3, .experts = 4, .scale = value}) ==
          "TopKRouter: scale: expected a finite number, got " + text);
  }
}

TEST_CASE("TopKRouter refuses what does not fit before it writes", "[routers]") {
  using R = TopKRouter<double>;
  const R router({.width = 5, .experts = 4, .k = 2});
  test::RouterCase<R> use(router, {});
  const auto good = use.problem(3);
  const auto refusal = [&](const auto& problem, const test::RouterUse<R>& how) {
    use.use = how;
    test::RouterCall<R> call(use, good);
    call.forward();
    const auto before = call.decision();
    std::string text = "accepted";
    call.give(problem);
    try {
      call.forward();
    } catch (const mole::Error& error) {
      text = error.what();
    }
    CHECK(test::bits_of(call.decision(), before) == "");
    return text;
  };
  auto bad = good;
  bad.x = Matrix<double>(3, 6);
  CHECK(refusal(bad, {}) == "x: expected [3, 5], got [3, 6]");
  bad = good;
  bad.forbidden = Matrix<std::uint8_t>(3, 5);
  CHECK(refusal(bad, {}) == "overrides.forbidden: expected [3, 4], got [3, 5]");
  bad = good;
  bad.forced = {0, 4, -1};
  CHECK(refusal(bad, {}) == "overrides.forced: expert 4 is not in -1 ... 3");

  const std::vector<double> short_bias(3);
  test::RouterCall<R> call(use, good);
  use.use.buffers = {short_bias};
  CHECK_THROWS_WITH(call.forward(), "selection_bias: expected 4 values, got 3");
}

TEST_CASE("TopKRouter refuses parameters of another shape", "[routers]") {
  const TopKRouter<double> router({.width = 5, .experts = 4, .k = 2});
  mole::Buffer memory(router.prepared_bytes());
  mole::Workspace workspace(memory.span());
  const Matrix<double> weight(4, 6), right(4, 5), bias(1, 4);
  CHECK_THROWS_WITH(router.prepare({weight, {}}, workspace), "weight: expected [4, 5], got [4, 6]");
  CHECK_THROWS_WITH(router.prepare({right, bias}, workspace), "bias: expected [0, 0], got [1, 4]");
}

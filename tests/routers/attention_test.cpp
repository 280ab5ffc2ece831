// SPDX-License-Identifier: Apache-2.0
// The router whose logits come from attention among the experts.
#include "mole/routers/attention.hpp"

#include "contracts/router_table.hpp"
#include "support/reference.hpp"

namespace {

using mole::Index;
using mole::TopKOrder;
using Router = mole::AttentionRouter<double>;
using test::reference::Row;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Keep>
void each_router(Keep keep) {
  keep(ROUTER_ROW(AttentionRouter, .width = 13, .experts = 7));
  keep(ROUTER_ROW(AttentionRouter, .width = 5, .experts = 67, .k = 5, .renormalise = false,
                  .temperature = T(0.8)));
  keep(ROUTER_ROW(AttentionRouter, .width = 13, .experts = 7, .k = 3, .score = mole::Score::sigmoid,
                  .renorm_epsilon = T(1e-3), .scale = T(2.5), .bias = true));
  keep(ROUTER_ROW(AttentionRouter, .width = 13, .experts = 5, .k = 2,
                  .order = TopKOrder::topk_then_score, .temperature = T(2), .bias = true));
  keep(ROUTER_ROW(AttentionRouter, .width = 13, .experts = 1, .k = 1, .renormalise = false));
}

/// x weightᵀ + bias of one token.
Row projected(const mole::LinearParams<double>& linear, const test::Matrix<double>& x, Index t) {
  Row row;
  for (Index e = 0; e < linear.weight.rows; ++e) {
    double sum = linear.bias.rows > 0 ? linear.bias(0, e) : 0;
    for (Index i = 0; i < x.cols(); ++i) sum += x(t, i) * linear.weight(e, i);
    row.push_back(sum);
  }
  return row;
}

/// The whole attention of one token, experts x experts.
Row attended(const Row& query, const Row& key, const Row& value) {
  Row logits;
  for (const double q : query) {
    Row products;
    for (const double k : key) products.push_back(q * k);
    const Row share = test::reference::softmax(products);
    double sum = 0;
    for (std::size_t j = 0; j < value.size(); ++j) sum += share[j] * value[j];
    logits.push_back(sum);
  }
  return logits;
}

/// A router of width 1 whose query, key and value for x = 1 are these numbers.
struct Numbers {
  test::RouterCase<Router> use;
  test::RouterProblem<double> problem;

  Numbers(const Row& query, const Row& key, const Row& value)
      : use(Router({.width = 1,
                    .experts = static_cast<Index>(query.size()),
                    .k = static_cast<Index>(query.size())}),
            {}),
        problem(use.problem(1)) {
    problem.x(0, 0) = 1;
    for (Index e = 0; e < use.router.experts(); ++e) {
      use.params.query.weight(e, 0) = query[e];
      use.params.key.weight(e, 0) = key[e];
      use.params.value.weight(e, 0) = value[e];
    }
    use.prepare();
  }
};

}  // namespace

TEST_CASE("Attention routers keep the router contract", "[routers]") {
  each_router([](auto... row) { test::keep_the_contract(row...); });
}

TEST_CASE("Attention routers give the same bits on threads", "[routers][threads]") {
  each_router([](auto... row) { test::keep_the_threads_contract(row...); });
}

TEST_CASE("An attention router weighs the values of all experts by query and key", "[routers]") {
  using mole::Score;
  for (const Index experts : {1, 5, 67}) {
    for (const auto score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
      for (const bool score_first : {true, false}) {
        for (const bool renormalise : {true, false}) {
          INFO(experts << " experts, score " << static_cast<int>(score) << ", score first "
                       << score_first << ", renormalise " << renormalise);
          const Index k = std::min<Index>(experts, 3);
          const Router router(
              {.width = 11,
               .experts = experts,
               .k = k,
               .score = score,
               .order = score_first ? TopKOrder::score_then_topk : TopKOrder::topk_then_score,
               .renormalise = renormalise,
               .renorm_epsilon = 0.25,
               .temperature = 0.5,
               .scale = 1.5,
               .bias = score_first});
          const test::RouterCase<Router> use(router, {});
          const auto problem = use.problem(4);
          const auto decision = test::decide(use, problem);
          const test::reference::TopK plain{static_cast<std::size_t>(k),
                                            static_cast<test::reference::Score>(score),
                                            score_first,
                                            renormalise,
                                            0.25,
                                            0.5,
                                            1.5};
          for (Index t = 0; t < 4; ++t) {
            const Row want = attended(projected(use.params.query, problem.x, t),
                                      projected(use.params.key, problem.x, t),
                                      projected(use.params.value, problem.x, t));
            for (Index e = 0; e < experts; ++e) {
              CHECK(decision.logits(t, e) == Catch::Approx(want[e]).epsilon(1e-12).margin(1e-13));
            }
            auto chosen = plain.select(want);
            const Row gates = plain.gates(want, chosen);
            std::sort(chosen.begin(), chosen.end());
            REQUIRE(decision.experts[t] == chosen);
            for (std::size_t i = 0; i < chosen.size(); ++i) {
              CHECK(decision.gates[t][i] == Catch::Approx(gates[chosen[i]]).epsilon(1e-12));
            }
          }
        }
      }
    }
  }
}

TEST_CASE("The three maps of an attention router are not interchangeable", "[routers]") {
  const Row a = {0.5, -1, 2}, b = {1, 0.25, -0.75}, c = {3, -2, 0.5};
  Numbers numbers(a, b, c);
  const auto decision = test::decide(numbers.use, numbers.problem);
  const double first = std::exp(0.5), second = std::exp(0.125), third = std::exp(-0.375);
  CHECK(decision.logits(0, 0) ==
        Catch::Approx((first * 3 - second * 2 + third * 0.5) / (first + second + third)));
  CHECK(decision.logits(0, 0) != Catch::Approx(attended(b, a, c)[0]));
  CHECK(decision.logits(0, 0) != Catch::Approx(attended(a, c, b)[0]));
}

TEST_CASE("A key that is no number takes its expert out of the attention alone", "[routers]") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Numbers numbers({0.5, -1, 2}, {1, nan, -0.75}, {3, -2, 0.5});
  const auto decision = test::decide(numbers.use, numbers.problem);
  const Row want = attended({0.5, -1, 2}, {1, -0.75}, {3, 0.5});
  for (Index e = 0; e < 3; ++e) CHECK(decision.logits(0, e) == Catch::Approx(want[e]));
  const auto gradient = test::differentiate(numbers.use, numbers.problem);
  const Index key = 3, value = 6;  // where these parameters begin
  for (const double d : gradient.params) CHECK(std::isfinite(d));
  CHECK(gradient.params[key + 1] == 0);
  CHECK(gradient.params[value + 1] == 0);
  CHECK(gradient.params[key] != 0);
}

TEST_CASE("A query that is no number, or attends to nobody, makes an expert unavailable",
          "[routers]") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Numbers numbers({0.5, nan, -kInfinity}, {1, 2, 0.75}, {3, -2, 0.5});
  const auto decision = test::decide(numbers.use, numbers.problem);
  CHECK(decision.logits(0, 0) == Catch::Approx(attended({0.5}, {1, 2, 0.75}, {3, -2, 0.5})[0]));
  CHECK(decision.experts[0] == std::vector<std::int32_t>{0});
  CHECK(decision.logits(0, 1) == -kInfinity);
  CHECK(decision.logits(0, 2) == -kInfinity);
  for (const double d : test::differentiate(numbers.use, numbers.problem).params) {
    CHECK(std::isfinite(d));
  }
}

TEST_CASE("Products that overflow share their row and pass the gradient to the values only",
          "[routers]") {
  // Expert 0 attends to 0 and 2, whose products are +infinity; expert 1 to all alike.
  Numbers numbers({1e200, 0, 1e-300}, {1e200, -1, 1e150}, {3, -2, 0.5});
  test::RouterCall<Router> call(numbers.use, numbers.problem);
  call.forward();
  const auto decision = call.decision();
  CHECK(decision.logits(0, 0) == 1.75);
  CHECK(decision.logits(0, 1) == Catch::Approx(0.5));
  mole::params::zero(call.d_tape());
  call.d_tape().logits(0, 0) = 8;
  call.backward();
  const auto gradient = call.gradient();
  const std::vector<double> want = {0, 0, 0, 0, 0, 0, 4, 0, 4};
  CHECK(test::bit_difference(gradient.params, want) == "");
}

TEST_CASE("An attention router does not touch what has the share 0", "[routers]") {
  Numbers numbers({1, 2}, {1, -1e6}, {3, kInfinity});
  const auto decision = test::decide(numbers.use, numbers.problem);
  CHECK(decision.logits(0, 0) == 3);
  CHECK(decision.logits(0, 1) == 3);
  for (const double d : test::differentiate(numbers.use, numbers.problem).params) {
    CHECK(std::isfinite(d));
  }
}

TEST_CASE("An infinite logit of an attention router passes no gradient", "[routers]") {
  Numbers numbers({0.5, -1, 2}, {1, 0.25, -0.75}, {3, kInfinity, 0.5});
  CHECK(test::decide(numbers.use, numbers.problem).logits(0, 0) == kInfinity);
  for (const double d : test::differentiate(numbers.use, numbers.problem).params) CHECK(d == 0);
}

TEST_CASE("An attention router refuses wrong configs by name", "[routers]") {
  using Catch::Matchers::Message;
  const auto refuses = [](const Router::Config& config, const char* text) {
    CHECK_THROWS_MATCHES(Router(config), mole::Error, Message(text));
  };
  refuses({.width = 0, .experts = 4}, "AttentionRouter: width: expected at least 1, got 0");
  refuses({.width = 3, .experts = 0}, "AttentionRouter: experts: expected at least 1, got 0");
  refuses({.width = 3, .experts = 4, .k = 5}, "AttentionRouter: k: expected 1 ... experts, got 5");
  refuses({.width = 3, .experts = 4, .k = 0}, "AttentionRouter: k: expected 1 ... experts, got 0");
  refuses({.width = 3, .experts = 4, .renorm_epsilon = -1},
          "AttentionRouter: renorm_epsilon: expected a number from 0 up, got -1");
  refuses({.width = 3, .experts = 4, .temperature = 0},
          "AttentionRouter: temperature: expected a positive number, got 0");
  refuses({.width = 3, .experts = 4, .scale = kInfinity},
          "AttentionRouter: scale: expected a finite number, got inf");
}

TEST_CASE("An attention router refuses maps of the wrong shape", "[routers]") {
  const test::RouterCase<Router> use(Router({.width = 3, .experts = 4}), {});
  mole::Buffer room(use.router.prepared_bytes());
  mole::Workspace memory(room.span());
  auto params = use.const_params();
  params.value.weight.rows = 3;
  CHECK_THROWS_AS(use.router.prepare(params, memory), mole::Error);
  auto grad = use.params;
  grad.key.weight.cols = 2;
  CHECK_THROWS_AS(use.router.head().check_gradient(grad), mole::Error);
}

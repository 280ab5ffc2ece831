// SPDX-License-Identifier: Apache-2.0
// The stages that work on the row of one token.
#include "mole/routing/stages.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/gradcheck.hpp"
#include "support/matrix.hpp"
#include "support/reference.hpp"

namespace {

using mole::Index;
using mole::Score;
using test::Matrix;
using Ids = std::vector<std::int32_t>;
using Values = std::vector<double>;
namespace stages = mole::stages;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr Score kScores[] = {Score::softmax, Score::sigmoid, Score::sqrt_softplus};

Values scores(Score kind, const Values& u) {
  Values s(u.size(), -1.0);
  stages::score<double>(kind, u, s);
  return s;
}

Values row(const Matrix<double>& m) {
  return test::reference::row_of(m, 0);
}

}  // namespace

TEST_CASE("overrides change the logits they name", "[routing]") {
  const Matrix<double> bias(1, 4, [](Index, Index e) { return 10.0 * static_cast<double>(e); });
  const Matrix<std::uint8_t> forbidden(3, 4, [](Index t, Index e) { return t == 1 && e == 2; });
  const Ids forced = {-1, -1, 3};
  mole::Overrides<double> overrides;
  overrides.logit_bias = bias;
  overrides.forbidden = forbidden;
  overrides.forced = forced;
  const auto overridden = [&](Index t, Values logits) {
    stages::override_logits<double>(overrides, t, logits);
    return logits;
  };
  CHECK(overridden(0, {1, 2, 3, 4}) == Values{1, 12, 23, 34});
  CHECK(overridden(1, {1, 2, 3, 4}) == Values{1, 12, -kInfinity, 34});
  CHECK(overridden(2, {1, 2, 3, 4}) == Values{-kInfinity, -kInfinity, -kInfinity, 34});
  CHECK(overridden(0, {kNan, -kInfinity, kInfinity, 0}) ==
        Values{-kInfinity, -kInfinity, kInfinity, 30});
}

TEST_CASE("logits that are not finite lose their gradient", "[routing]") {
  Values dlogits = {1, 2, kNan, 4};
  const Values logits = {0, -kInfinity, kInfinity, 7};
  stages::override_logits_backward<double>(logits, dlogits);
  CHECK(dlogits == Values{1, 0, 0, 4});
}

TEST_CASE("scores are those of plain loops", "[routing]") {
  const Values u = row(test::random_matrix(1, 19, 3));
  for (const Score kind : kScores) {
    const auto want = test::reference::score(static_cast<test::reference::Score>(kind), u);
    CHECK(test::difference(scores(kind, u), want, {1e-14, 1e-15}) == "");
  }
}

TEST_CASE("experts that are not available score 0", "[routing]") {
  for (const Score kind : kScores) {
    const Values s = scores(kind, {-kInfinity, 1, -kInfinity});
    CHECK(s[0] == 0);
    CHECK(s[1] > 0);
    CHECK(s[2] == 0);
    CHECK(scores(kind, {-kInfinity, -kInfinity}) == Values{0, 0});
  }
}

TEST_CASE("infinite logits share the weight", "[routing]") {
  for (const Score kind : {Score::softmax, Score::sqrt_softplus}) {
    CHECK(scores(kind, {0, kInfinity, -kInfinity}) == Values{0, 1, 0});
    CHECK(scores(kind, {kInfinity, 5, kInfinity}) == Values{0.5, 0, 0.5});
  }
  CHECK(scores(Score::sigmoid, {kInfinity, 0}) == Values{1, 0.5});
}

TEST_CASE("softmax holds where its exponentials overflow", "[routing]") {
  const std::vector<float> u = {1e38f, -1e38f, 1e38f};
  std::vector<float> p(3);
  stages::softmax<float>(u, p);
  CHECK(p == std::vector<float>{0.5f, 0, 0.5f});
}

TEST_CASE("score_backward is the derivative of score", "[routing]") {
  for (const Score kind : kScores) {
    Matrix<double> u = test::random_matrix(1, 11, 5);
    const Values upstream = row(test::random_matrix(1, 11, 6));
    Matrix<double> du(1, 11);
    stages::score_backward<double>(kind, row(u), scores(kind, row(u)), upstream, du.view().row(0));
    const auto loss = [&] { return test::weighted_sum(upstream, scores(kind, row(u))); };
    CHECK(test::gradient_error(u, du, loss, {1e-8, 1e-9}) == "");
  }
}

TEST_CASE("score_backward is finite and adds nothing where scores have vanished", "[routing]") {
  for (const Score kind : kScores) {
    const Values u = {-kInfinity, -900, 0}, ds = {1, 1, 1};
    Values du(3);
    stages::score_backward<double>(kind, u, scores(kind, u), ds, du);
    CHECK(du[0] == 0);
    CHECK(du[1] == 0);
    CHECK(std::isfinite(du[2]));
  }
}

TEST_CASE("log_score is the logarithm of the score, in both tails", "[routing]") {
  for (const Score kind : {Score::sigmoid, Score::sqrt_softplus}) {
    for (const double u : {-45.0, -39.0, -20.0, -1.0, 0.0, 2.0, 50.0}) {
      INFO("u = " << u);
      const double want = std::log(scores(kind, {u})[0]);
      CHECK(stages::log_score(kind, u) == Catch::Approx(want).epsilon(1e-12).margin(1e-14));
      const double step = 1e-4;
      const double slope =
          (stages::log_score(kind, u + step) - stages::log_score(kind, u - step)) / (2 * step);
      CHECK(stages::log_score_slope(kind, u) == Catch::Approx(slope).epsilon(1e-7).margin(1e-9));
    }
  }
  CHECK(stages::log_score(Score::sigmoid, -900.0) == -900);
  CHECK(stages::log_score(Score::sqrt_softplus, -900.0) == -450);
}

TEST_CASE("the key is value plus bias, and -inf where the logit is", "[routing]") {
  const Values u = {1, -kInfinity, 3}, value = {0.25, 0.5, 0.75}, bias = {1, 2, 3};
  Values key(3);
  stages::selection_key<double>(u, value, bias, key);
  CHECK(key == Values{1.25, -kInfinity, 3.75});
  stages::selection_key<double>(u, value, {}, key);
  CHECK(key == Values{0.25, -kInfinity, 0.75});
}

TEST_CASE("select_top_k takes the largest, the lower index first among equals", "[routing]") {
  const auto select = [](const Values& key, std::size_t k) {
    Ids chosen(k);
    chosen.resize(static_cast<std::size_t>(stages::select_top_k<double>(key, chosen)));
    return chosen;
  };
  CHECK(select({1, 3, 2}, 2) == Ids{1, 2});
  CHECK(select({2, 2, 2, 2}, 3) == Ids{0, 1, 2});
  CHECK(select({1, 2, 1, 2, 1}, 4) == Ids{1, 3, 0, 2});
  CHECK(select({-kInfinity, kNan, -1e300, kInfinity}, 3) == Ids{3, 2});
  CHECK(select({kNan, -kInfinity}, 1).empty());
  CHECK(select({1, 2}, 0).empty());
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const Values key = row(test::random_matrix(1, 67, seed));  // on a grid: with equals
    for (const std::size_t k : {1u, 5u, 67u}) {
      CHECK(select(key, k) == test::reference::top_k(key, k));
    }
  }
}

TEST_CASE("weigh_backward is the derivative of weigh", "[routing]") {
  const Ids chosen = {4, 0, 5};
  const Values dgate = {0.5, -1, 2};
  for (const Score kind : kScores) {
    for (const bool over_selection : {false, true}) {
      for (const double epsilon : {-1.0, 0.0, 0.25}) {  // -1: not renormalised
        const mole::Weighting<double> how{kind, over_selection, epsilon >= 0,
                                          std::max(epsilon, 0.0), 1.5};
        Matrix<double> u = test::random_matrix(1, 7, 8);
        const auto loss = [&] {
          Values gate(3);
          stages::weigh<double>(how, row(u), scores(kind, row(u)), chosen, gate);
          return test::weighted_sum(dgate, gate);
        };
        Values ds(7), work(3);
        Matrix<double> du(1, 7);
        const Values s = scores(kind, row(u));
        stages::weigh_backward<double>(how, row(u), s, chosen, dgate, ds, du.view().row(0), work);
        stages::score_backward<double>(kind, row(u), s, ds, du.view().row(0));
        INFO("score " << static_cast<int>(kind) << " over_selection " << over_selection
                      << " epsilon " << epsilon);
        CHECK(test::gradient_error(u, du, loss, {1e-8, 1e-9}) == "");
      }
    }
  }
}

TEST_CASE("shares agree with renormalised scores where both can be formed", "[routing]") {
  const Values u = row(test::random_matrix(1, 7, 9));
  const Ids chosen = {6, 1, 2, 3};
  for (const Score kind : kScores) {
    const Values s = scores(kind, u);
    double sum = 0;
    for (const std::int32_t e : chosen) sum += s[e];
    Values gate(4), want;
    for (const std::int32_t e : chosen) want.push_back(s[e] / sum);
    stages::weigh<double>({kind, false, true, 0, 1}, u, s, chosen, gate);
    CHECK(test::difference(gate, want, {1e-14, 0}) == "");
    stages::weigh<double>({kind, false, true, 1e-300, 1}, u, s, chosen, gate);
    CHECK(test::difference(gate, want, {1e-14, 0}) == "");
  }
}

TEST_CASE("the threshold keeps gates that reach it", "[routing]") {
  Ids chosen = {3, 1, 2, 0};
  Values gate = {0.5, 0.25, kNan, 0.3};
  CHECK(stages::limit_threshold(0.3, std::span(chosen), std::span(gate)) == 2);
  CHECK(Ids(chosen.begin(), chosen.begin() + 2) == Ids{3, 0});
  CHECK(Values(gate.begin(), gate.begin() + 2) == Values{0.5, 0.3});
}

TEST_CASE("capacity goes to the earlier tokens", "[routing]") {
  Ids used(3, 0);
  const auto keep = [&](Ids chosen) {
    Values gate(chosen.size(), 0.5);
    const Index kept = stages::limit_capacity<double>(2, used, chosen, gate);
    chosen.resize(static_cast<std::size_t>(kept));
    return chosen;
  };
  CHECK(keep({0, 1}) == Ids{0, 1});
  CHECK(keep({0, 2}) == Ids{0, 2});
  CHECK(keep({0, 1}) == Ids{1});
  CHECK(keep({1, 0}).empty());
  CHECK(used == Ids{4, 3, 1});
}

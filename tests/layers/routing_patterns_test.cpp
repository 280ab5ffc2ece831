// SPDX-License-Identifier: Apache-2.0
// Ways of routing that need no router of their own: docs/routers.md, "Patterns".
#include <vector>

#include "layers/layer_case.hpp"
#include "mole/routers/hash.hpp"
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

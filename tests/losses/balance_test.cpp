// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/balance.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/gradcheck.hpp"
#include "support/matrix.hpp"
#include "support/reference.hpp"
#include "support/slots.hpp"

namespace {

using mole::BalanceLoss;
using mole::Index;
using mole::LoadPer;
using test::Matrix;

constexpr Index kTokens = 11, kExperts = 5;

struct Example {
  test::Slots slots = test::random_slots(kTokens, kExperts, 0.5, 3);
  Matrix<double> prob{kTokens, kExperts,
                      [](Index t, Index e) { return (7 * t + 3 * e) % 10 / 8.0; }};
  std::vector<std::uint8_t> mask = {1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0};

  Matrix<double> selected() const {
    Matrix<double> m(kTokens, kExperts);
    for (Index t = 0; t < kTokens; ++t) {
      for (const test::Slot& slot : slots[t]) m(t, slot.expert) = slot.gate != 0;
    }
    return m;
  }
};

template <class T>
T loss(const BalanceLoss<T>& how, const test::OwnedRouting<T>& routing, mole::MatView<const T> prob,
       mole::MatView<T> dprob = {}) {
  mole::Buffer memory(2 * mole::aligned_bytes(kExperts * sizeof(double)) + mole::kAlignment);
  mole::Workspace scratch(memory.span());
  return mole::balance_loss(how, *routing, prob, dprob, mole::Context{scratch});
}

}  // namespace

TEST_CASE("the balance loss is E Σ f P", "[losses]") {
  const Example example;
  const test::OwnedRouting<double> routing(example.slots, kExperts);
  const std::vector<std::uint8_t> all(kTokens, 1);
  for (const bool masked : {false, true}) {
    for (const LoadPer per : {LoadPer::token, LoadPer::selection}) {
      BalanceLoss<double> how{.weight = 0.25, .load_per = per};
      if (masked) how.mask = example.mask;
      const double want = test::reference::balance(
          example.prob, example.selected(), masked ? example.mask : all, per == LoadPer::token);
      CHECK(loss<double>(how, routing, example.prob) == Catch::Approx(0.25 * want).epsilon(1e-14));
    }
  }
}

TEST_CASE("the balance loss in float agrees with double", "[losses]") {
  const Example example;
  const auto prob = test::converted<float>(example.prob);
  const double want = loss<double>({}, {example.slots, kExperts}, example.prob);
  CHECK(loss<float>({}, {example.slots, kExperts}, prob) == Catch::Approx(want).epsilon(1e-6));
}

TEST_CASE("the gradient of the balance loss is added, to real tokens only", "[losses]") {
  Example example;
  const test::OwnedRouting<double> routing(example.slots, kExperts);
  for (const LoadPer per : {LoadPer::token, LoadPer::selection}) {
    const BalanceLoss<double> how{.weight = 0.5, .load_per = per, .mask = example.mask};
    Matrix<double> dprob(kTokens, kExperts, [](Index, Index) { return 8; });
    loss<double>(how, routing, example.prob, dprob);
    CHECK(dprob.padding_is_intact());
    for (Index t = 0; t < kTokens; ++t) {
      for (Index e = 0; e < kExperts; ++e) {
        if (example.mask[t] == 0) CHECK(dprob(t, e) == 8);
        dprob(t, e) -= 8;
      }
    }
    const auto value = [&] { return loss<double>(how, routing, example.prob); };
    CHECK(test::gradient_error(example.prob, dprob.view(), value, {1e-8, 1e-10}) == "");
  }
}

TEST_CASE("perfect balance costs k per token and 1 per selection", "[losses]") {
  test::Slots slots(kExperts);
  for (Index t = 0; t < kExperts; ++t) {
    for (Index i = 0; i < 2; ++i) {
      slots[t].push_back({static_cast<std::int32_t>((t + i) % kExperts), 0.5});
    }
  }
  const Matrix<double> prob(kExperts, kExperts, [](Index, Index) { return 0.2; });
  const test::OwnedRouting<double> routing(slots, kExperts);
  CHECK(loss<double>({}, routing, prob) == Catch::Approx(2));
  CHECK(loss<double>({.load_per = LoadPer::selection}, routing, prob) == Catch::Approx(1));
}

TEST_CASE("probes count only on request", "[losses]") {
  const test::OwnedRouting<double> routing({{{0, 1.0}, {1, 0.0}}}, 2);
  const Matrix<double> prob(1, 2, [](Index, Index e) { return e == 0 ? 0.75 : 0.25; });
  CHECK(loss<double>({}, routing, prob) == 1.5);
  CHECK(loss<double>({.count_zero_gates = true}, routing, prob) == 2);
}

TEST_CASE("nothing selected, or no real token, costs nothing", "[losses]") {
  const Matrix<double> prob(2, 3, [](Index, Index) { return 1; });
  Matrix<double> dprob(2, 3);
  CHECK(loss<double>({}, {{{}, {}}, 3}, prob, dprob) == 0);
  const std::vector<std::uint8_t> none(2, 0);
  CHECK(loss<double>({.mask = none}, {{{{0, 1.0}}, {{1, 1.0}}}, 3}, prob, dprob) == 0);
  CHECK(test::bit_difference(dprob, Matrix<double>(2, 3)) == "");
  CHECK(loss<double>({}, {{}, 3}, Matrix<double>(0, 3)) == 0);
}

TEST_CASE("the balance loss refuses other shapes", "[losses]") {
  const test::OwnedRouting<double> routing({{}, {}}, 3);
  const Matrix<double> prob(2, 3);
  Matrix<double> narrow(2, 2);
  const std::vector<std::uint8_t> mask(3, 1);
  CHECK_THROWS_WITH(loss<double>({}, routing, narrow), "prob: expected [2, 3], got [2, 2]");
  CHECK_THROWS_WITH(loss<double>({}, routing, prob, narrow), "dprob: expected [2, 3], got [2, 2]");
  CHECK_THROWS_WITH(loss<double>({.mask = mask}, routing, prob), "mask: expected 2 values, got 3");
}

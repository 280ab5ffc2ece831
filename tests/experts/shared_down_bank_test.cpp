// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/shared_down_bank.hpp"

#include <string>
#include <vector>

#include "contracts/bank_trial.hpp"
#include "mole/experts/lora_bank.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using Catch::Matchers::ContainsSubstring;
using mole::Index;
using mole::LoraBank;
using mole::SharedDownBank;
using test::bit_difference;

namespace {

template <class T>
typename SharedDownBank<T>::Config config_of(Index rank) {
  typename SharedDownBank<T>::Config config;
  config.in = 131;
  config.out = 149;
  config.rank = rank;
  config.scale = {T(0.5), T(2), T(-0.25)};
  return config;
}

/// Independent experts with the same A.
template <class T>
LoraBank<T> unshared(const SharedDownBank<T>& bank) {
  typename LoraBank<T>::Config config;
  config.in = bank.input_width();
  config.out = bank.output_width();
  config.rank.assign(static_cast<std::size_t>(bank.experts()), bank.config().rank);
  config.scale = bank.config().scale;
  return LoraBank<T>(config);
}

}  // namespace

TEMPLATE_TEST_CASE("SharedDownBank has the bits of a LoraBank with A repeated", "[bank]", float,
                   double) {
  using T = TestType;
  for (const Index rank : {Index{7}, Index{67}, Index{0}}) {
    const SharedDownBank<T> bank(config_of<T>(rank));
    const LoraBank<T> twin(unshared(bank));
    const test::BankTrial trial(bank);
    test::BankTrial twin_trial(twin);
    for (Index e = 0; e < 3; ++e) {
      const auto copy = [](auto from, auto to) {
        for (Index r = 0; r < to.rows; ++r) std::ranges::copy(from.row(r), to.row(r).begin());
      };
      copy(trial.params().down, twin_trial.params().down_of(e));
      copy(trial.params().up_of(e), twin_trial.params().up_of(e));
    }
    twin_trial.prepare();
    const auto c = trial.call(test::random_slots(67, 3, 0.7, 2));
    CHECK(bit_difference(trial.forward(c), twin_trial.forward(c)) == "");

    const auto got = trial.backward(c), want = twin_trial.backward(c);
    CHECK(bit_difference(got.dgate, want.dgate) == "");
    CHECK(difference(got.dx, want.dx, test::rounding<T>()) == "");
    const auto down_size = static_cast<std::size_t>(rank * 131);
    const auto up_size = static_cast<std::size_t>(rank * 149);
    std::vector<T> ddown(down_size);
    for (std::size_t e = 0; e < 3; ++e) {
      const auto expert = std::span(want.params).subspan(e * (down_size + up_size));
      for (std::size_t i = 0; i < down_size; ++i) ddown[i] += expert[i];
      CHECK(bit_difference(std::span(got.params).subspan(down_size + e * up_size, up_size),
                           expert.subspan(down_size, up_size)) == "");
    }
    CHECK(difference(std::vector<T>(got.params.begin(), got.params.begin() + rank * 131), ddown,
                     test::rounding<T>()) == "");
  }
}

TEST_CASE("SharedDownBank says which field of its config is wrong", "[bank]") {
  const auto message = [](auto&& change) -> std::string {
    auto config = config_of<float>(7);
    change(config);
    try {
      const SharedDownBank<float> bank(config);
    } catch (const mole::Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(message([](auto&) {}) == "");
  CHECK_THAT(message([](auto& c) { c.in = 0; }), ContainsSubstring("in must be positive"));
  CHECK_THAT(message([](auto& c) { c.out = 0; }), ContainsSubstring("out must be positive"));
  CHECK_THAT(message([](auto& c) { c.rank = -1; }), ContainsSubstring("rank must not be negative"));
  CHECK_THAT(message([](auto& c) { c.scale.clear(); }), ContainsSubstring("scale must name"));
}

TEST_CASE("SharedDownBank refuses weights of another shape", "[bank]") {
  const SharedDownBank<float> bank(config_of<float>(7));
  const test::BankTrial trial(bank);
  const auto refused = [&](auto&& change) {
    SharedDownBank<float>::Weights weights = trial.params();
    change(weights);
    mole::Buffer memory(bank.prepared_bytes());
    mole::Workspace workspace(memory.span());
    try {
      bank.prepare(weights, workspace);
    } catch (const mole::Error& error) {
      return error.code() == mole::Errc::shape_mismatch;
    }
    return false;
  };
  CHECK(refused([](auto& w) { w.down.rows = 6; }));
  CHECK(refused([](auto& w) { w.down.cols = 130; }));
  CHECK(refused([](auto& w) { w.out = 150; }));
  CHECK(refused([](auto& w) { w.up = w.up.first(2); }));
}

TEST_CASE("SharedDownBank refuses gradients and tapes of another shape", "[bank]") {
  using Bank = SharedDownBank<float>;
  using Trial = test::BankTrial<Bank>;
  const Bank bank(config_of<float>(7));
  const Trial trial(bank);
  const auto c = trial.call(test::dense_slots(3, 3));
  const test::OwnedRouting<float> routing(c.slots, 3);
  Trial::Memory memory(trial, *routing, {});
  Trial::Gradients good(trial, c, *routing, 0);
  auto tape = memory.make_tape(trial, *routing);
  test::Matrix<float> y = c.y;
  bank.forward(trial.prepared(), trial.input(c), *routing, y, &tape, memory.context);
  const auto run = [&](const Bank::Tape& saved, const Bank::Params<float>& grad) {
    bank.backward(trial.params(), saved, trial.input(c), *routing, c.dy.view(), good.value.dgate,
                  {}, grad, memory.context);
  };
  CHECK_NOTHROW(run(tape, good.params));
  CHECK_THROWS_AS(run({}, good.params), mole::Error);
  auto grad = good.params;
  grad.up = grad.up.first(2);
  CHECK_THROWS_AS(run(tape, grad), mole::Error);
  grad = good.params;
  grad.down.rows = 6;
  CHECK_THROWS_AS(run(tape, grad), mole::Error);
  grad = good.params;
  grad.down.data = nullptr;
  CHECK_NOTHROW(run(tape, grad));
}
